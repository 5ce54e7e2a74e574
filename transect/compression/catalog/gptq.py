"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323)."""

from typing import Annotated

from torch import Tensor

from ...operators.grouped_integer import GroupedInteger
from ...statistics import InputCovariance
from ..in_order import rounded_in_order
from ..integers import integer_size
from ..registry import Range, replacement


@replacement("gptq", paper="arXiv:2210.17323", size=integer_size, even=True, needs=[InputCovariance()])
def gptq(
    weight: Tensor,
    covariance: Tensor,
    *,
    bits: int,
    group: Annotated[int, Range(1, 65536)] = 64,
    symmetric: bool = False,
    act_order: bool = False,
    damping: Annotated[float, Range(1e-6, 1)] = 0.01,
) -> GroupedInteger:
    """Round column by column to a few bits; the columns that are still to come make up for each rounding.

    With H = E[x xᵀ] and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), rounding W_ij to its grid leaves the error
    e = (W_ij - Ŵ_ij) / U_jj, and subtracting e U_j,j: from the row is the best that the columns from j on can do
    (Algorithm 1). A group's grid is laid over its weights as they are when its first column's turn comes.

    bits: 2, 3, 4, 5, 6 or 8, the most that the budget pays for.

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    act_order: take the columns of the largest features first. The grids are then laid over the weights as they were
        before (what the field calls static groups), so that nothing more is stored.
    damping: added to the diagonal of H, relative to its mean; the authors' default.
    """
    return rounded_in_order(weight, covariance, bits, group, symmetric, act_order, damping)
