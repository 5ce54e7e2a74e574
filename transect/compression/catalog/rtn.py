"""Rounding to the nearest of a few integers (the baseline of every paper on quantization)."""

from typing import Annotated

from torch import Tensor

from ...operators.grouped_integer import GroupedInteger
from ..integers import Grid, grouped, integer_size
from ..registry import Range, replacement


@replacement("rtn", paper="the baseline of arXiv:2210.17323", size=integer_size, even=True)
def rtn(
    weight: Tensor, *, bits: int, group: Annotated[int, Range(1, 65536)] = 64, symmetric: bool = False
) -> GroupedInteger:
    """Round each weight to the nearest of a few steps from the least to the largest of its group; no data.

    bits: 2, 3, 4 or 8, the most that the budget pays for.

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    """
    groups = grouped(weight, group)
    grid = Grid.of(groups, bits, symmetric)
    codes = grid.codes(groups).flatten(1)[:, : weight.shape[1]]
    return GroupedInteger.from_codes(codes, grid.scale, None if symmetric else grid.zero, bits, group)
