"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323)."""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from ...operators.grouped_integer import GroupedInteger
from ...statistics import InputCovariance
from ..cholesky import inverse_root
from ..in_order import round_in_order
from ..integers import Grid, grouped, integer_size
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

    bits: 2, 3, 4 or 8, the most that the budget pays for.

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    act_order: take the columns of the largest features first. The grids are then laid over the weights as they were
        before (what the field calls static groups), so that nothing more is stored.
    damping: added to the diagonal of H, relative to its mean; the authors' default.
    """
    order = _order(covariance, act_order)
    upper, dead = inverse_root(covariance, damping, order)
    weight, upper = torch.where(dead, 0, weight).float(), upper.float()
    grids = Grid.of(grouped(weight, group), bits, symmetric)
    scale, zero = (tensor.T.contiguous() for tensor in (grids.scale, grids.zero))  # groups x d_out
    groups = (order // group).tolist()

    def grid_of(j: int, ahead: Callable[[int], Tensor]) -> Grid:
        number = groups[j]
        if not act_order and j % group == 0:
            grid = Grid.of(ahead(group).T, bits, symmetric)
            scale[number], zero[number] = grid.scale, grid.zero
        return Grid(bits, scale[number], zero[number])

    codes = round_in_order(weight.T[order], upper, grid_of)
    back = torch.empty_like(codes)
    back[order] = codes
    return GroupedInteger.from_codes(back.T, scale.T, None if symmetric else zero.T, bits, group)


def _order(covariance: Tensor, act_order: bool) -> Tensor:
    diagonal = covariance.diagonal()
    return diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal))
