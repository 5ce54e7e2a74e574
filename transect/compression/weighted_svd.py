"""The best low-rank approximation under a metric on either side; every factorization here is a choice of metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import raised_cholesky, triangular_inverse

# A metric that weighs a direction less than this, relative to its mean, would be inverted into noise.
_FLOOR = 1e-12


@dataclass(frozen=True)
class Factorization:
    """W = left @ right, ordered so that the first r columns and rows are the best rank-r approximation.

    left: (d_out x k), right: (k x d_in), k = min(d_out, d_in). singular_values: (k) of the weighted matrix, descending:
    dropping component j costs singular_values[j]² in the method's objective.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor

    def losses(self) -> Tensor:
        """(k + 1): the objective's value at rank 0, 1 ... k, the sum of the squared singular values dropped."""
        energies = self.singular_values.double().square()
        return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """L (d_out x rank) and R (rank x d_in)."""
        return self.left[:, :rank], self.right[:rank]


def weighted_svd(
    weight: Tensor, output_metric: Tensor | None = None, input_metric: Tensor | None = None
) -> Factorization:
    """Minimise tr(Γ (W - Ŵ) A (W - Ŵ)ᵀ) over Ŵ of rank r, for every r at once.

    weight: W (m x n). output_metric: Γ (m x m), positive definite, or its diagonal (m), or None for the identity.
    input_metric: A (n x n), or its diagonal (n), or None; it may be singular where m <= n.
    Where a metric is 0 everywhere (a norm without weights, outputs that no gradient reaches), nothing can be lost: all
    singular values are 0. The factors are then those of the identity in its place, so that what they drop is small.

    With Γ = L Lᵀ and A = S Sᵀ this is the SVD of LᵀWS (K-FAC SVD; SVD-LLM with Γ = I; FWSVD with diagonal Γ). It needs
    neither that SVD nor, on the longer side, a root: if U holds the leading eigenvectors of (LᵀWS)(LᵀWS)ᵀ = LᵀWAWᵀL,
    then Ŵ = L⁻ᵀ U Uᵀ Lᵀ W. Where m > n the mirror image is used. One symmetric eigenproblem of the shorter side, in
    float64; its squared condition number costs singular values below 1e-8 of the largest, which no budget keeps.
    """
    m, n = weight.shape
    weight = weight.double()
    output_metric, output_scale = _normalised(output_metric, weight)
    input_metric, input_scale = _normalised(input_metric, weight)
    if m <= n:
        root, inverse = _root(output_metric, m, weight)
        rotated = _times(root, weight, transpose=True)  # Lᵀ W
        gram = _times(input_metric, rotated.T).T @ rotated.T  # Lᵀ W A Wᵀ L
        vectors, values = _eigh_descending(gram)
        left, right = _times(inverse, vectors, transpose=True), vectors.T @ rotated
    else:
        root, inverse = _root(input_metric, n, weight)
        rotated = _times(root, weight.T, transpose=True).T  # W S
        gram = rotated.T @ _times(output_metric, rotated)  # Sᵀ Wᵀ Γ W S
        vectors, values = _eigh_descending(gram)
        left, right = rotated @ vectors, _times(inverse, vectors, transpose=True).T
    # Both factors get the square root of the singular value, so that neither is badly scaled in a narrow dtype.
    balance = torch.where(values > values[:1] * 1e-8, values, torch.ones_like(values)).sqrt()
    if m <= n:
        left, right = left * balance, right / balance[:, None]
    else:
        left, right = left / balance, right * balance[:, None]
    return Factorization(left, values * (output_scale * input_scale) ** 0.5, right)


def shrink(covariance: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) M + alpha mean(diag M) I: keeps a covariance of few samples invertible."""
    mean = covariance.diagonal().mean()
    shrunk = covariance * (1 - alpha)
    shrunk.diagonal().add_(alpha * mean)
    return shrunk


def _times(metric: Tensor | None, x: Tensor, transpose: bool = False) -> Tensor:
    """M x or Mᵀ x for a full M, a diagonal one given as a vector, or the identity given as None."""
    if metric is None:
        return x
    if metric.ndim == 1:
        return metric[:, None] * x
    return (metric.T if transpose else metric) @ x


def _normalised(metric: Tensor | None, like: Tensor) -> tuple[Tensor | None, float]:
    """The metric over the mean of its diagonal, and that mean; the identity (None), and 0, for one that is 0."""
    if metric is None:
        return None, 1.0
    metric = metric.to(like)
    scale = float((metric if metric.ndim == 1 else metric.diagonal()).mean())
    if abs(scale) < torch.finfo(torch.float64).tiny:  # 0, or so small that nothing can be divided by it
        return None, 0.0
    return metric / scale, scale


def _root(metric: Tensor | None, size: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """S with S Sᵀ = metric, and S⁻¹. A singular metric is raised by the least amount that makes it definite."""
    if metric is None:
        return None, None
    if metric.ndim == 1:
        root = metric.clamp_min(_FLOOR).sqrt()
        return root, 1 / root
    root, _ = raised_cholesky(metric)
    return root, triangular_inverse(root)


def _eigh_descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (columns) and singular values (roots of the eigenvalues), largest first."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
