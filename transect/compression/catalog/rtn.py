"""Rounding to the nearest of a few integers (the baseline of every paper on quantization)."""

from typing import Annotated

from torch import Tensor

from ...operators.grouped_integer import GroupedInteger
from ..integers import integer_size, to_nearest
from ..registry import Range, replacement


@replacement("rtn", paper="the baseline of arXiv:2210.17323", size=integer_size, even=True)
def rtn(
    weight: Tensor, *, bits: int, group: Annotated[int, Range(1, 65536)] = 64, symmetric: bool = False
) -> GroupedInteger:
    """Round each weight to the nearest of a few steps from the least to the largest of its group; no data.

    bits: 2, 3, 4, 5, 6 or 8, the most that the budget pays for.

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    """
    return to_nearest(weight, bits, group, symmetric)
