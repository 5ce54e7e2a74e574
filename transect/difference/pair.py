"""Two checkpoints of one model, and which of their blocks and matrices are the same one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..data import Specimen
from ..errors import TransectError
from ..forward import task_of


@dataclass(frozen=True)
class Pair(Specimen):
    """The first model on the table, with text and questions, beside the `other`."""

    other: Specimen = field(default_factory=lambda: Specimen(None))  # type: ignore[arg-type]

    @cached_property
    def blocks(self) -> dict[int, int]:
        """Numbers of the other's blocks -> of the first's that they came from, in order.

        The same number where there are as many. Of a model that lost some, those whose matrices are nearest.
        """
        ours, theirs = self.layers, self.other.layers
        if ours == theirs:
            return {number: number for number in range(ours)}
        if theirs > ours:
            raise TransectError(
                f"the second model has {theirs} blocks and the first {ours}: name first the one that the other came "
                "from"
            )
        apart = torch.tensor([
            [_apart(self.anatomy, a, self.other.anatomy, b) for a in range(ours)] for b in range(theirs)
        ])  # fmt: skip
        return dict(enumerate(_in_order(apart)))

    def matrices_of_both(self) -> list[tuple[Matrix, Matrix | None]]:
        """Every matrix of the first model, with the other's of that block and role; None where there is none."""
        theirs = {origin: number for number, origin in self.blocks.items()}
        found = []
        for block in self.anatomy.blocks:
            number = theirs.get(block.index)
            kept = {} if number is None else {m.role: m for m in self.other.anatomy.blocks[number].matrices()}
            found += [(matrix, kept.get(matrix.role)) for matrix in block.matrices()]
        return found


def pair_of(first: Specimen, other: Specimen) -> Pair:
    """Both as a pair; TransectError where they are not checkpoints of one model."""
    for what, of in (("task", task_of), ("width", _width), ("vocabulary", _vocabulary)):
        ours, theirs = of(first.model), of(other.model)
        if ours != theirs:
            raise TransectError(
                f"these are not checkpoints of one model: the first has the {what} {ours}, the second {theirs}"
            )
    pair = Pair(**{name: getattr(first, name) for name in Specimen.__dataclass_fields__}, other=other)
    _ = pair.blocks
    return replace(pair)


def _width(model: Any) -> int:
    return Anatomy(model).config_value("hidden")


def _vocabulary(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _apart(first: Anatomy, a: int, other: Anatomy, b: int) -> float:
    """How far apart two blocks are: the mean over their matrices of one shape of |A - B|² / (|A|² + |B|²)."""
    theirs = {matrix.role: matrix for matrix in other.blocks[b].matrices()}
    found = []
    for matrix in first.blocks[a].matrices():
        one = theirs.get(matrix.role)
        if one is not None and one.shape == matrix.shape:
            x, y = matrix.weight.float(), one.weight.float()
            found.append(float((x - y).square().sum() / (x.square().sum() + y.square().sum()).clamp_min(1e-30)))
    return sum(found) / len(found) if found else 1.0


def _in_order(apart: Tensor) -> list[int]:
    """For each row a column, rising, so that the sum of the entries is least."""
    rows, columns = apart.shape
    best = torch.full((rows + 1, columns + 1), float("inf"), dtype=torch.float64)
    best[0] = 0
    for row in range(1, rows + 1):
        for column in range(row, columns + 1):
            taken = best[row - 1, column - 1] + apart[row - 1, column - 1]
            best[row, column] = torch.minimum(best[row, column - 1], taken)
    chosen, column = [], columns
    for row in range(rows, 0, -1):
        while column > row and best[row, column - 1] <= best[row, column]:
            column -= 1
        column -= 1
        chosen.append(column)
    return chosen[::-1]


def standing_for(first: Tensor, other: Tensor, axis: int) -> Tensor | None:
    """The matrix of the first's shape that the other stands for, where rows (axis 0) or columns (1) were taken out.

    Each of the other's must be one of the first's, but for a tenth of its length; what is gone is 0. None otherwise.
    """
    a, b = (matrix.float() if axis == 0 else matrix.float().T for matrix in (first, other))
    if a.shape[1] != b.shape[1] or len(b) >= len(a) or not len(b):
        return None
    distance, nearest = torch.cdist(b, a).min(dim=1)
    if bool((distance > 0.1 * b.norm(dim=1).clamp_min(1e-12)).any()) or len(nearest.unique()) != len(b):
        return None
    whole = torch.zeros_like(a)
    whole[nearest] = b
    return whole if axis == 0 else whole.T
