"""What a hardened model computes, in whole numbers: which variables are read, predicates, tables, and the classifier.

Of every variable it is known which values it can take, so that nothing is written down that never happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import TransectError
from .model import UNIT, Block, Lookups, ProgramModel

Value = str | int
LARGEST = 1 << 12  # a count, of which two are the input of a table
_AT_ONCE = 1 << 16  # entries of a table


@dataclass(frozen=True)
class Variable:
    """One of the stream. name: as the program has it. values: that it can take, in rising order.

    words: of the values' ids, if they are words; else they are numbers.
    """

    name: str
    values: Sequence[int]
    words: Sequence[str] | None = None

    def shown(self, value: int) -> Value:
        """The value as a program has it."""
        return value if self.words is None else self.words[value]


@dataclass(frozen=True)
class Head:
    """A head. name: its number in the program. query, key, value: what it reads. counts: whether it is a numerical one.

    predicate: of each value of the query, the one that the key must have.
    """

    name: str
    query: Variable
    key: Variable
    value: Variable
    counts: bool
    predicate: Mapping[int, int]
    output: Variable

    @property
    def reads(self) -> tuple[Variable, ...]:
        return self.query, self.key, self.value


@dataclass(frozen=True)
class Table:
    """An MLP. inputs: the two variables that it reads; one, if both are the same.

    entries: the value of the output for each of the inputs' values, in their order; one or two dimensions.
    """

    name: str
    inputs: Sequence[Variable]
    counts: bool
    entries: Tensor
    output: Variable

    @property
    def reads(self) -> tuple[Variable, ...]:
        return tuple(self.inputs)


@dataclass(frozen=True)
class Read:
    """A whole model. layers: of each its heads and tables, in the order in which they can be computed.

    categorical, numerical: the variables as the stream has them. weights: of the labels, in `UNIT`s of a nat, by the
    name of a variable: a row a value, or one row to be multiplied by the variable if it is numerical.
    """

    length: int
    causal: bool
    layers: Sequence[Sequence[Head | Table]]
    categorical: Sequence[Variable]
    numerical: Sequence[Variable]
    weights: Mapping[str, Sequence[Sequence[int]]]


def read(model: ProgramModel, words: Sequence[str]) -> Read:
    """Everything of a hardened model. words: by id, the first is padding, which no position holds.

    Raises TransectError for a model that is not hardened.
    """
    sizes = model.sizes
    if model.unit != UNIT:
        raise TransectError("only a hardened model can be read as a program: give hardened(model)")
    categorical = [
        Variable("token", range(1, sizes.vocabulary), words),
        Variable("position", range(sizes.length)),
    ]  # fmt: skip
    numerical, layers = [Variable("one", [1])], []
    for number, block in enumerate(model.blocks):
        steps = _layer(cast(Block, block), number, sizes.length, categorical, numerical)
        layers.append(steps)
    weights = model.classifier.long()
    table = {
        variable.name: [weights[i, value].tolist() for value in variable.values]
        for i, variable in enumerate(categorical)
    }
    rows = model.numerical_classifier.long().tolist()
    table |= {variable.name: [row] for variable, row in zip(numerical, rows, strict=True)}
    return Read(sizes.length, sizes.causal, layers, categorical, numerical, table)


def _layer(
    block: Block, layer: int, length: int, categorical: list[Variable], numerical: list[Variable]
) -> list[Head | Table]:
    """What a layer does. Its variables are put behind the others."""
    both, heads = block.both, block.heads
    reads, predicates = block.reads.argmax(-1).tolist(), block.predicates.argmax(-1).tolist()
    counted = block.counted.argmax(-1).tolist()
    steps: list[Head | Table] = []
    for number in range(both):
        query, key = categorical[reads[number]], categorical[reads[both + number]]
        predicate = {value: predicates[number][value] for value in query.values}
        if number < heads:
            name, value = f"{layer}_{number}", categorical[reads[2 * both + number]]
            output = Variable(f"attn_{name}_output", value.values, value.words)
        else:
            name, value = f"{layer}_{number - heads}", numerical[counted[number - heads]]
            times = 1 if key.name == "position" else length  # a position is that of one key
            output = Variable(f"count_{name}_output", range(times * value.values[-1] + 1))
        steps.append(Head(name, query, key, value, number >= heads, predicate, output))
    categorical += [step.output for step in steps[:heads]]
    numerical += [step.output for step in steps[heads:]]
    tables = _tables(block.mlps, layer, categorical, block.predicates.shape[-1])
    tables += _tables(block.numerical_mlps, layer, numerical, 0)
    categorical += [table.output for table in tables]
    return [*steps, *tables]


def _tables(lookups: Lookups, layer: int, variables: Sequence[Variable], width: int) -> list[Table]:
    """width: v where the variables are categorical, 0 where they are numbers."""
    found = []
    for number, (first, second) in enumerate(lookups.reads.argmax(-1).tolist()):
        inputs = [variables[first]] if first == second else [variables[first], variables[second]]
        grid = torch.cartesian_prod(*(torch.tensor(list(one.values)) for one in inputs)).view(-1, len(inputs))
        parts = []
        for part in grid.expand(-1, 2).split(_AT_ONCE):  # the same twice, if both are one variable
            given = functional.one_hot(part, width).flatten(1) if width else part
            parts.append(lookups.logits(given.to(lookups.into), number).argmax(-1))
        entries = torch.cat(parts).view([len(one.values) for one in inputs])
        name = f"{'' if width else 'count_'}mlp_{layer}_{number}"
        output = Variable(f"{name}_output", entries.unique().tolist())
        found.append(Table(name, inputs, not width, entries, output))
    return found
