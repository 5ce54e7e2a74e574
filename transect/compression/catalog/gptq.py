"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323)."""

from typing import Annotated

import torch
from torch import Tensor

from ...operators.grouped_integer import GroupedInteger
from ...statistics import InputCovariance
from ..cholesky import inverse_root
from ..integers import Grid, grouped, integer_size
from ..registry import Range, replacement

_BLOCK = 128  # columns between two updates of all that follow; changes the speed, not the result


@replacement("gptq", paper="arXiv:2210.17323", size=integer_size, needs=[InputCovariance()])
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

    group: consecutive weights of a row that share a scale and an offset.
    symmetric: no offset: as many steps below zero as above, but one.
    act_order: take the columns of the largest features first. The grids are then laid over the weights as they were
        before (what the field calls static groups), so that nothing more is stored.
    damping: added to the diagonal of H, relative to its mean; the authors' default.
    """
    d_in = weight.shape[1]
    order = _order(covariance, act_order)
    upper, dead = inverse_root(covariance, damping, order)
    weight = torch.where(dead, 0, weight)
    grids = Grid.of(grouped(weight, group), bits, symmetric)
    scale, shift = grids.scale.clone(), grids.shift.clone()
    work = weight[:, order]  # in the order in which they are rounded
    codes = torch.empty_like(work)
    for start in range(0, d_in, _BLOCK):
        stop = min(start + _BLOCK, d_in)
        errors = torch.empty_like(work[:, start:stop])  # (d_out, block): (W_ij - Ŵ_ij) / U_jj
        for j in range(start, stop):
            number = int(order[j]) // group
            if not act_order and j % group == 0:
                # What is to be subtracted for the columns of this block has not reached the columns beyond it.
                members = work[:, j : min(j + group, d_in)].clone()
                if j + group > stop:
                    members[:, stop - j :] -= errors[:, : j - start] @ upper[start:j, stop : j + group]
                grid = Grid.of(members, bits, symmetric)
                scale[:, number], shift[:, number] = grid.scale, grid.shift
            one = Grid(bits, scale[:, number], shift[:, number])
            column = work[:, j, None]
            codes[:, j] = one.codes(column)[:, 0]
            error = (column - one.values(codes[:, j, None]))[:, 0] / upper[j, j]
            errors[:, j - start] = error
            work[:, j:stop] -= error[:, None] * upper[j, j:stop]
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return GroupedInteger.from_codes(back, scale, None if symmetric else shift, bits, group)


def _order(covariance: Tensor, act_order: bool) -> Tensor:
    diagonal = covariance.diagonal()
    return diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal))
