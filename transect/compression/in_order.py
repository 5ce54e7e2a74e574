"""Rounding to grids one after another, those that are still to come making up for each (GPTQ, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.grouped_integer import GroupedInteger
from .cholesky import inverse_root
from .integers import Grid, grouped

_BLOCK = 64  # columns between two updates of all that follow; changes the speed, not the result
GridOf = Callable[[int, Callable[[int], Tensor]], Grid]


def rounded_in_order(
    weight: Tensor, covariance: Tensor, bits: int, group: int, symmetric: bool, act_order: bool, damping: float
) -> GroupedInteger:
    """W (d_out x d_in) by GPTQ, for second moments H = E[x xᵀ] (d_in x d_in) of its inputs; see the method `gptq`.

    act_order: take the columns of the largest features first; the grids are then laid over W as it comes.
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


def round_in_order(work: Tensor, upper: Tensor, grid_of: GridOf) -> Tensor:
    """The integers (uint8) of a matrix whose columns are the rows of `work` (d_in x d_out), which is used up.

    upper: U (d_in x d_in), upper triangular, with H⁻¹ = UᵀU for the second moments H of what the columns multiply.
    grid_of: of (j, ahead), the grid of each number of column j; ahead(count) are the columns from j on, `count` of
    them, as the roundings so far have changed them.

    Rounding column j leaves the error e = (w_j - ŵ_j) / U_jj, and subtracting U_jk e from every column k > j is the
    best that those can do (Algorithm 1). A column's numbers lie side by side, so that it is read at once.
    """
    d_in = len(work)
    codes, diagonal = torch.empty_like(work, dtype=torch.uint8), upper.diagonal().tolist()
    for start in range(0, d_in, _BLOCK):
        stop = min(start + _BLOCK, d_in)
        errors = torch.empty_like(work[start:stop])  # (block, d_out)

        def ahead(count: int) -> Tensor:
            # What is to be subtracted for the columns of this block has not reached those beyond it.
            columns = work[j : j + count].clone()  # noqa: B023 - called in this turn of the loops
            columns[stop - j :] -= upper[start:j, stop : j + count].T @ errors[: j - start]  # noqa: B023
            return columns

        for j in range(start, stop):
            grid = grid_of(j, ahead)
            column = work[j, :, None]
            number = grid.codes(column)
            codes[j] = number[:, 0]
            errors[j - start] = (column - grid.values(number))[:, 0] / diagonal[j]
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return codes
