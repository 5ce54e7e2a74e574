"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323)."""

from typing import Annotated

import torch
from torch import Tensor

from ...operators.grouped_integer import GroupedInteger
from ...statistics import InputCovariance
from ..cholesky import inverse_root
from ..integers import Grid, grouped, integer_size
from ..registry import Range, replacement

_BLOCK = 64  # columns between two updates of all that follow; changes the speed, not the result


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

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    act_order: take the columns of the largest features first. The grids are then laid over the weights as they were
        before (what the field calls static groups), so that nothing more is stored.
    damping: added to the diagonal of H, relative to its mean; the authors' default.
    """
    d_in = weight.shape[1]
    order = _order(covariance, act_order)
    upper, dead = inverse_root(covariance, damping, order)
    weight, upper = torch.where(dead, 0, weight).float(), upper.float()
    grids = Grid.of(grouped(weight, group), bits, symmetric)
    # A column's numbers lie side by side (d_in x d_out), in the order in which they are rounded: it is read at once.
    work, scale, zero = (tensor.T.contiguous() for tensor in (weight[:, order], grids.scale, grids.zero))
    codes = torch.empty_like(work, dtype=torch.uint8)
    diagonal, groups = upper.diagonal().tolist(), (order // group).tolist()
    for start in range(0, d_in, _BLOCK):
        stop = min(start + _BLOCK, d_in)
        errors = torch.empty_like(work[start:stop])  # (block, d_out): (W_ij - Ŵ_ij) / U_jj
        for j in range(start, stop):
            if not act_order and j % group == 0:
                # What is to be subtracted for the columns of this block has not reached the columns beyond it.
                members = work[j : min(j + group, d_in)].clone()
                members[stop - j :] -= upper[start:j, stop : j + group].T @ errors[: j - start]
                grid = Grid.of(members.T, bits, symmetric)
                scale[groups[j]], zero[groups[j]] = grid.scale, grid.zero
            one = Grid(bits, scale[groups[j]], zero[groups[j]])
            column = work[j, :, None]
            number = one.codes(column)
            codes[j] = number[:, 0]
            errors[j - start] = (column - one.values(number))[:, 0] / diagonal[j]
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        work[stop:] -= upper[start:stop, stop:].T @ errors
    back = torch.empty_like(codes)
    back[order] = codes
    return GroupedInteger.from_codes(back.T, scale.T, None if symmetric else zero.T, bits, group)


def _order(covariance: Tensor, act_order: bool) -> Tensor:
    diagonal = covariance.diagonal()
    return diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal))
