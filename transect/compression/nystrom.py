"""Which hidden units to keep, and how the matrix that reads them makes up for the others: the Nyström approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from .cholesky import raised_cholesky, triangular_inverse

UPDATE_RIDGE = 1e-6  # relative to the mean diagonal of C; our choice, the sources use 1e-6 to 1e-4 for inverse roots


def leverage_scores(covariance: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores s_i = [C (C + λI)⁻¹]_ii (n) of C = E[h hᵀ] (n x n), λ = ridge · mean diag C; ridge > 0.

    Each is in [0, 1): how badly unit i is predicted by the others. Their sum is the effective dimension Σ μ/(μ + λ)
    over C's eigenvalues μ. All 0 for C = 0.
    """
    if not covariance.any():
        return torch.zeros_like(covariance.diagonal())
    factor, strength = raised_cholesky(covariance, ridge * covariance.diagonal().mean())
    # (L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹, whose diagonal is the squared columns of L⁻¹
    return (1 - strength * triangular_inverse(factor).square_().sum(0)).clamp(0, 1)


def nystrom_update(weight: Tensor, covariance: Tensor, kept: Tensor, ridge: float = UPDATE_RIDGE) -> Tensor:
    """B (d_out x k), of y = B h_J, that reproduces y = W h (d_out) best from the kept units J alone.

    Without a ridge B = W C_:J C_JJ⁺, the least squares solution for C = E[h hᵀ] (n x n). Here B minimises
    E||W h - B h_J||² + ε ||B - W_:J||² with ε = ridge · mean diag C: B = W_:J + W_:R C_RJ (C_JJ + εI)⁻¹, R the units
    that go. So C may be singular, and the error is never above that of W_:J, which is what B is where C says nothing.
    """
    own = weight[:, kept]
    if not covariance.any():
        return own.clone()
    gone = torch.ones(len(covariance), dtype=torch.bool, device=covariance.device)
    gone[kept] = False
    factor, _ = raised_cholesky(covariance[kept][:, kept], ridge * covariance.diagonal().mean())
    target = weight[:, gone] @ covariance[gone][:, kept]  # d_out x k
    return own + torch.cholesky_solve(target.T, factor).T
