"""What a search may choose: axes with sizes, and which dimension of which parameter each of them makes shorter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, Block, Experts, Matrix
from ..anatomy.storage import is_dense
from ..errors import OutOfReach, TransectError
from .entangle import UNTOUCHED, factors, levels_of

Picked = Mapping[str, int]  # axis -> index of the choice
Weights = Mapping[str, Tensor]  # axis -> β (C)
Role = Literal["mixed", "hidden unit", "norm", "counted"]
WHAT = ("neurons", "heads", "depth", "hidden")


@dataclass(frozen=True)
class Axis:
    """Something of which the size is searched.

    name: `neurons`, `heads`, `depth` or `hidden`, for the whole model, or of one block: `blocks.3.neurons`.
    choices: sizes, rising. most: the size that the model has. `heads` are key/value heads, each with its queries.
    """

    name: str
    choices: tuple[int, ...]
    most: int


@dataclass(frozen=True)
class Span:
    """One dimension of one parameter that an axis makes shorter.

    levels: see `entangle.levels_of`; UNTOUCHED for other parts of a fused matrix.
    role: `mixed`, always; `hidden unit`, rows that make a unit whose way out is mixed as well; `norm`, of a norm over
    the stream; `counted`, rows that need no mixing, since what they make is mixed behind them.
    """

    axis: str
    dim: int
    levels: Tensor
    role: Role


@dataclass(frozen=True)
class Sized:
    """A weight matrix as it is counted. sides: sizes by choice, of each axis. rest: the product of its other sides."""

    block: int
    rest: int
    sides: dict[str, list[int]]


@dataclass
class Space:
    """Every network that can be cut out of one model, which is the largest of them.

    spans: by the parameter's name. matrices: names of the blocks' weight matrices, the numbers that are counted, and
    the block of each.
    """

    anatomy: Anatomy
    axes: dict[str, Axis]
    spans: dict[str, list[Span]] = field(default_factory=dict)
    matrices: dict[str, int] = field(default_factory=dict)

    def numbers(self, weights: Weights) -> Tensor:
        """Σ_c β_c numbers_c of the blocks' matrices, over all combinations: the expected size, with its gradient to β.

        float64. For one-hot weights it is the size of that network. Axes are independent, so sides multiply.
        """
        there = self.presence(weights)
        total = torch.zeros((), dtype=torch.float64)
        for sized in self._sized:
            sides = [
                (weights[axis].double().cpu() * torch.tensor(sizes, dtype=torch.float64)).sum()
                for axis, sizes in sized.sides.items()
            ]
            total = total + torch.stack([there[sized.block] * sized.rest, *sides]).prod()
        return total

    @cached_property
    def _sized(self) -> list[Sized]:
        """The blocks' matrices and how large each choice makes them."""
        shapes = {name: parameter.shape for name, parameter in self.anatomy.model.named_parameters()}
        found = []
        for name, block in self.matrices.items():
            spans = {span.dim: span for span in self.spans.get(name, [])}
            rest = math.prod(size for dim, size in enumerate(shapes[name]) if dim not in spans)
            sides = {span.axis: self._kept(span) for span in spans.values()}
            found.append(Sized(block, rest, sides))
        return found

    def _kept(self, span: Span) -> list[int]:
        """How many indices of the span each choice keeps."""
        return [int((span.levels <= choice).sum()) for choice in range(len(self.axes[span.axis].choices))]

    def presence(self, weights: Weights) -> Tensor:
        """The weight of every block: Σ of β over the depths that have it; 1 where depth is not searched. float64."""
        count = len(self.anatomy.block_list)
        if "depth" not in self.axes:
            return torch.ones(count, dtype=torch.float64)
        return factors(weights["depth"].double().cpu(), levels_of(count, self.axes["depth"].choices))

    def one_hot(self, picked: Picked) -> dict[str, Tensor]:
        """The weights of that choice alone."""
        return {
            name: nn.functional.one_hot(torch.tensor(picked[name]), len(axis.choices)).float()
            for name, axis in self.axes.items()
        }

    def size(self, picked: Picked) -> int:
        """Numbers of the blocks' matrices of that network."""
        depth = self.axes["depth"].choices[picked["depth"]] if "depth" in self.axes else len(self.anatomy.block_list)
        return sum(
            sized.rest * math.prod(sizes[picked[axis]] for axis, sizes in sized.sides.items())
            for sized in self._sized
            if sized.block < depth
        )

    @property
    def whole(self) -> int:
        """Numbers of the blocks' matrices of the model as it is."""
        shapes = {name: parameter.numel() for name, parameter in self.anatomy.model.named_parameters()}
        return sum(shapes[name] for name in self.matrices)

    @property
    def smallest(self) -> dict[str, int]:
        """The smallest network."""
        return dict.fromkeys(self.axes, 0)

    def within(self, size: int, keep: float | None) -> bool:
        """Whether so many numbers are at most `keep` of the model's, which rounding must not decide."""
        return keep is None or size <= keep * self.whole * (1 + 1e-12)

    def check_reach(self, keep: float | None) -> None:
        """Raise OutOfReach where even the smallest network is larger than `keep` of the model's numbers."""
        size = self.size(self.smallest)
        if not self.within(size, keep):
            raise OutOfReach(
                f"the smallest network of this space has {size / self.whole:.3f} of the matrices' numbers, more than "
                f"keep={keep:g}: name smaller sizes, or more axes"
            )

    def fitted(self, picked: Picked, keep: float | None, price: Callable[[str, int], float]) -> dict[str, int]:
        """The picked network made smaller, axis by axis, until it has at most `keep` of the numbers.

        price: of choosing this index on this axis. Each time the change is made that costs least for the numbers that
        it saves.
        """
        now = dict(picked)
        while not self.within(size := self.size(now), keep):
            options = []
            for name, index in now.items():
                for lower in range(index):
                    saved = size - self.size({**now, name: lower})
                    if saved > 0:
                        options.append(((price(name, lower) - price(name, index)) / saved, name, lower))
            _, name, lower = min(options)
            now[name] = lower
        return now


def space_of(anatomy: Anatomy, sizes: Mapping[str, Sequence[int]], *, shared: bool = False) -> Space:
    """The space of these sizes.

    sizes: of `neurons`, `heads`, `depth` and `hidden` (the stream's width), those to choose from. shared: all blocks
    have one number of neurons and of heads, so that an ordinary config describes the result; otherwise each its own.
    Raises TransectError for sizes that the model does not have, and for what cannot be made smaller.
    """
    if not sizes:
        raise TransectError(f"nothing to search: name sizes of at least one of {', '.join(WHAT)}")
    space = Space(anatomy, {})
    names = {id(parameter): name for name, parameter in anatomy.model.named_parameters()}
    for block in anatomy.blocks:
        _parts(block)
    for matrix in anatomy.matrices():
        if not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}: a search cuts slices of dense matrices, "
                "so begin with the dense model"
            )
        space.matrices[names[id(matrix.module.weight)]] = matrix.block.index
    for what, given in sizes.items():
        if what == "depth":
            anatomy.refuse_dropping_blocks()
            space.axes["depth"] = _axis("depth", given, len(anatomy.block_list))
        elif what == "hidden":
            _add_stream(space, names, given)
        elif what in ("neurons", "heads"):
            for block in anatomy.blocks:
                _add_block(space, names, block, what, given, shared)
        else:
            raise TransectError(f"unknown axis {what!r}; known: {', '.join(WHAT)}")
    return space


def quarters(most: int) -> tuple[int, ...]:
    """A quarter, a half, three quarters and all of a size, as far as these differ."""
    return tuple(sorted({max(1, most * part // 4) for part in range(1, 5)}))


def default_sizes(anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """Quarters of the neurons, and of the key/value heads where there are several."""
    mlp, attention = _parts(anatomy.blocks[0])
    found = {"neurons": quarters(mlp.neurons), "heads": quarters(attention.key_value_heads)}
    return {what: sizes for what, sizes in found.items() if len(sizes) > 1}


def _axis(name: str, given: Sequence[int], most: int) -> Axis:
    if not given:
        raise TransectError(f"{name}: there are no sizes to choose from")
    if len(set(given)) != len(given) or min(given) < 1 or max(given) > most:
        raise TransectError(f"{name}: sizes must be different whole numbers from 1 to {most}, got {list(given)}")
    return Axis(name, tuple(sorted(given)), most)


def _parts(block: Block) -> tuple[Any, Any]:
    mlp, attention = block.mlp, block.attention
    if mlp is None or attention is None or isinstance(mlp, Experts):
        raise TransectError(
            f"block {block.index} has "
            + ("a mixture of experts" if isinstance(mlp, Experts) else "lost a sublayer")
            + ": a search needs blocks with one attention and one MLP"
        )
    return mlp, attention


def _add_block(
    space: Space, names: dict[int, str], block: Block, what: str, given: Sequence[int], shared: bool
) -> None:
    mlp, attention = _parts(block)
    name = what if shared else f"blocks.{block.index}.{what}"
    most = mlp.neurons if what == "neurons" else attention.key_value_heads
    axis = _axis(name, given, most)
    if name in space.axes and space.axes[name].most != most:
        raise TransectError(f"the blocks have different numbers of {what}, so they cannot share one: leave out shared")
    space.axes[name] = axis
    levels = levels_of(most, axis.choices)
    if what == "neurons":
        for matrix in (mlp.up, mlp.gate):
            if matrix is not None:
                _rows(space, names, matrix, name, levels, "hidden unit")
        _columns(space, names, mlp.down, name, levels)
        return
    weight = getattr(attention.q_norm, "weight", None)
    if weight is not None and weight.dim() == 1 and weight.numel() == attention.q.shape[0] != attention.head_size:
        raise TransectError(
            "this model normalises the queries of all heads together, so that fewer heads change the others: leave out "
            "heads"
        )
    # Heads are independent up to the output matrix: mixing its columns mixes the outputs of every number of heads.
    # Mixing queries and keys would change what the softmax attends to.
    queries = levels.repeat_interleave(attention.q.shape[0] // most)
    _rows(space, names, attention.q, name, queries, "counted")
    for matrix in (attention.k, attention.v):
        _rows(space, names, matrix, name, levels.repeat_interleave(attention.head_size), "counted")
    _columns(space, names, attention.o, name, queries)


def _add_stream(space: Space, names: dict[int, str], given: Sequence[int]) -> None:
    anatomy = space.anatomy
    width = anatomy.config_value("hidden")
    if not anatomy.architecture.head_size_is_configurable or anatomy.config is not anatomy.model.config:
        raise TransectError(
            f"the stream of a {type(anatomy.model).__name__} cannot be made narrower: its config gives no head size of "
            "its own, or stands inside another. Leave out hidden"
        )
    heads = anatomy.config_value("heads")
    axis = _axis("hidden", given, width)
    if uneven := [size for size in axis.choices if size % heads]:
        raise TransectError(f"hidden: {uneven} are no multiples of the {heads} heads, as the model's config wants them")
    space.axes["hidden"] = axis
    levels = levels_of(width, axis.choices)
    for matrix in anatomy.matrices():
        if matrix.role in ("o", "down"):
            _rows(space, names, matrix, "hidden", levels, "mixed")
        else:
            _columns(space, names, matrix, "hidden", levels)
    for table in (anatomy.embedding, anatomy.unembedding):
        if table is not None:
            _add(space, names, table.weight, 1, None, "hidden", levels, "mixed")
    for norm in norms_of(anatomy):
        for parameter in norm.parameters():
            _add(space, names, parameter, 0, None, "hidden", levels, "norm")


def norms_of(anatomy: Anatomy) -> list[nn.Module]:
    """The norms over the stream."""
    found = [norm for block in anatomy.blocks for norm in block.norms.values()]
    return found if anatomy.final_norm is None else [*found, anatomy.final_norm]


def _rows(space: Space, names: dict[int, str], matrix: Matrix, axis: str, levels: Tensor, role: Role) -> None:
    module, rows = matrix.module, matrix.rows()
    _add(space, names, module.weight, 1 if isinstance(module, Conv1D) else 0, rows, axis, levels, role)
    if module.bias is not None:
        _add(space, names, module.bias, 0, rows, axis, levels, role)


def _columns(space: Space, names: dict[int, str], matrix: Matrix, axis: str, levels: Tensor) -> None:
    module = matrix.module
    _add(space, names, module.weight, 0 if isinstance(module, Conv1D) else 1, None, axis, levels, "mixed")


def _add(
    space: Space, names: dict[int, str], parameter: Any, dim: int, rows: Any, axis: str, levels: Tensor, role: Role
) -> None:
    """Note a span, or more rows of one: fused matrices share a parameter, and tied embeddings a table."""
    spans = space.spans.setdefault(names[id(parameter)], [])
    span = next((one for one in spans if (one.axis, one.dim) == (axis, dim)), None)
    if span is None:
        span = Span(axis, dim, torch.full((parameter.shape[dim],), UNTOUCHED), role)
        spans.append(span)
    span.levels[slice(None) if rows is None else rows] = levels
