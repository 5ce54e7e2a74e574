"""Cholesky factors of matrices that should be positive definite, and are so only up to rounding, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TransectError

_LEAST = 1e-10  # tried first where no ridge is asked for, relative to the mean of the diagonal
_LEAF = 64  # rows of a triangle that is inverted at once
_STEPS = 12  # tenfold ones; from the least they end far above what rounding can make negative


def raised_cholesky(matrix: Tensor, ridge: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """L (lower triangular) with L Lᵀ = M + εI, and ε: `ridge`, or the first of 10, 100 ... times it that will do.

    matrix: M (n x n), symmetric; one that is 0 everywhere is raised like an identity.
    A Gram matrix of fewer samples than features is singular, and one that was summed in float32 has slightly negative
    eigenvalues. Raises TransectError for a matrix that is far from positive definite, or not finite.
    """
    mean = matrix.diagonal().mean()
    least = _LEAST * torch.where(mean == 0, torch.ones_like(mean), mean)
    strength = torch.as_tensor(ridge).to(matrix)
    for _ in range(_STEPS):
        raised = matrix.clone()
        raised.diagonal().add_(strength)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            return factor, strength
        strength = torch.maximum(10 * strength, least)
    raise TransectError(
        f"a {len(matrix)} x {len(matrix)} matrix of second moments is far from positive definite, or not finite: is "
        "the calibration data valid?"
    )


def triangular_inverse(root: Tensor) -> Tensor:
    """L⁻¹ (n x n) of a lower triangular L, by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]].

    Solving for the columns of an identity spends two thirds of its time on what is known to be 0.
    """
    n = len(root)
    if n <= _LEAF:
        return torch.linalg.solve_triangular(root, torch.eye(n, dtype=root.dtype, device=root.device), upper=False)
    half = n // 2
    inverse = torch.zeros_like(root)
    inverse[:half, :half] = triangular_inverse(root[:half, :half])
    inverse[half:, half:] = triangular_inverse(root[half:, half:])
    between = root[half:, :half] @ inverse[:half, :half].neg()
    inverse[half:, :half] = torch.linalg.solve_triangular(root[half:, half:], between, upper=False)
    return inverse


def inverse_root(covariance: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U (upper triangular) with (H + εI)⁻¹ = UᵀU, and which features are never on; what GPTQ and SparseGPT go by.

    H: second moments E[x xᵀ] (d_in x d_in). ε: `damping` times the mean of its diagonal, over the features that are
    ever on; the others count as if they were that large and uncorrelated. order: of the features in U; theirs.
    """
    dead = covariance.diagonal() == 0
    mean = covariance.diagonal()[~dead].mean() if not dead.all() else covariance.new_ones(())
    hessian = covariance.clone()
    hessian.diagonal()[dead] = mean
    if order is not None:
        hessian = hessian[order][:, order]
    # The upper root R of H = R Rᵀ is the lower one of H in reversed order, and U = R⁻¹.
    root, _ = raised_cholesky(hessian.flip(0, 1), damping * mean)
    return triangular_inverse(root).flip(0, 1), dead
