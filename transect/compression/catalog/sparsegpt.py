"""SparseGPT to 2:4 (Frantar and Alistarh, ICML 2023, arXiv:2301.00774)."""

from typing import Annotated

import torch
from torch import Tensor

from ...operators.semi_structured import SemiStructured
from ...statistics import InputCovariance
from ..cholesky import inverse_root
from ..registry import Range, replacement
from ..two_four import ENGINES, best_two_of_four, two_four_size

_BLOCK = 128  # columns between two updates of all that follow; changes the speed, not the result


@replacement("sparsegpt", paper="arXiv:2301.00774", size=two_four_size, note=ENGINES, needs=[InputCovariance()])
def sparsegpt(
    weight: Tensor, covariance: Tensor, *, damping: Annotated[float, Range(1e-6, 1)] = 0.01
) -> SemiStructured:
    """Remove two of every four weights, column by column; those to the right make up for each removal.

    With H = E[x xᵀ] and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), removing W_ij costs row i (W_ij / U_jj)², and
    subtracting (W_ij / U_jj) U_j,j: from the row is the best that the columns from j on can do (Algorithm 1). A
    group's two are chosen when its first column's turn comes, after the updates so far. A feature that is never on
    loses its weights.

    damping: added to the diagonal of H, relative to its mean; the authors' default.
    """
    d_in, padding = weight.shape[1], -weight.shape[1] % 4
    weight = torch.nn.functional.pad(weight, (0, padding))
    hessian = torch.nn.functional.pad(covariance, (0, padding, 0, padding))
    upper, dead = inverse_root(hessian, damping)
    weight[:, dead] = 0
    scale = upper.diagonal()

    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:stop])  # (d_out, block): W_ij / U_jj of what is removed
        for j in range(start, stop):
            if j % 4 == 0:
                group = slice(j, j + 4)
                mask[:, group] = best_two_of_four((weight[:, group] / scale[group]) ** 2)
            error = torch.where(mask[:, j], 0, weight[:, j] / scale[j])
            errors[:, j - start] = error
            weight[:, j:stop] -= error[:, None] * upper[j, j:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return SemiStructured.from_dense(weight[:, :d_in], mask)
