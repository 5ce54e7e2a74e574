"""Cholesky factors of matrices that should be positive definite, and are so only up to rounding, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TransectError

_LEAST = 1e-10  # tried first where no ridge is asked for, relative to the mean of the diagonal
_STEPS = 12  # tenfold ones; from the least they end far above what rounding can make negative


def raised_cholesky(matrix: Tensor, ridge: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """L (lower triangular) with L Lᵀ = M + εI, and ε: `ridge`, or the first of 10, 100 ... times it that will do.

    matrix: M (n x n), symmetric; one that is 0 everywhere is raised like an identity.
    A Gram matrix of fewer samples than features is singular, and one that was summed in float32 has slightly negative
    eigenvalues. Raises TransectError for a matrix that is far from positive definite, or not finite.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    mean = matrix.diagonal().mean()
    least = _LEAST * torch.where(mean == 0, torch.ones_like(mean), mean)
    strength = torch.as_tensor(ridge).to(matrix)
    for _ in range(_STEPS):
        factor, failed = torch.linalg.cholesky_ex(matrix + strength * identity)
        if not failed:
            return factor, strength
        strength = torch.maximum(10 * strength, least)
    raise TransectError(
        f"a {len(matrix)} x {len(matrix)} matrix of second moments is far from positive definite, or not finite: is "
        "the calibration data valid?"
    )
