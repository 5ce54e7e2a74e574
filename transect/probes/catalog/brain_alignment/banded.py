"""Banded ridge regression in its kernel form (Nunez-Elizalde et al. 2019; la Tour et al. 2022).

min_b Σ_v ||y - Σ_k X_k b_k||² + Σ_k λ_k ||b_k||² with λ_k = λ / γ_k depends on the features of band k by their inner
products K_k = X_k X_kᵀ alone: α = (Σ_k γ_k K_k + λ)⁻¹ y and band k predicts γ_k K_k α. Channels are independent: each
has its own γ and λ, chosen by the squared error on contiguous blocks of the training samples. Means are taken away in
every fit, from its own training samples.

Shapes: K bands, N samples (n to train, m to predict), V channels, C candidates for γ, Λ values of λ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FOLDS = 4
# Of a kernel whose mean diagonal is 1. The paper's 0.1 to 1000 is for d standardised columns, that is d times as much.
PENALTIES = torch.logspace(-3, 4, 15, dtype=torch.float64)


@dataclass(frozen=True)
class Fit:
    """Predictions of the samples that are held out, and what was chosen.

    parts: what each band predicts (K x m x V), around the training mean. validation: R² on blocks of the training
    samples (V). weights: γ (V x K). penalties: λ (V).
    """

    parts: Tensor
    validation: Tensor
    weights: Tensor
    penalties: Tensor

    @property
    def predicted(self) -> Tensor:
        """m x V."""
        return self.parts.sum(0)


def fit(
    kernels: Tensor, responses: Tensor, training: Tensor, held_out: Tensor, *, candidates: Tensor, gap: int = 0,
    penalties: Tensor = PENALTIES,
) -> Fit:  # fmt: skip
    """Choose γ and λ for each channel on the training samples, fit on all of these, predict those held out.

    kernels: K x N x N. responses: N x V. training, held_out: numbers of samples. candidates: γ (C x K). gap: samples
    beside a block that are left out when it is predicted.
    """
    y = responses.double()
    errors = torch.zeros(len(candidates), len(penalties), y.shape[1], dtype=torch.float64)
    total = torch.zeros(y.shape[1], dtype=torch.float64)
    folds = blocks(training, FOLDS, gap)
    for kept, block in folds:
        known = y[kept] - y[kept].mean(0)
        wanted = y[block] - y[kept].mean(0)
        total += wanted.square().sum(0)
        inside, across = zip(*(centred(kernel, kept, block) for kernel in kernels), strict=True)
        inside, across = torch.stack(inside), torch.stack(across)
        for number, weights in enumerate(candidates):
            solved = Solver(torch.einsum("k,kij->ij", weights, inside), known)
            leading = torch.einsum("k,kij->ij", weights, across) @ solved.vectors
            for place, penalty in enumerate(penalties.tolist()):
                guess = leading @ solved.coefficients(penalty)
                errors[number, place] += (wanted - guess).square().sum(0)
    best = errors.flatten(0, 1).argmin(0)
    candidate, penalty = best // len(penalties), penalties[best % len(penalties)]
    smallest = errors.flatten(0, 1).gather(0, best[None])[0]
    validation = 1 - smallest / total.clamp_min(torch.finfo(total.dtype).tiny)
    inside, across = zip(*(centred(kernel, training, held_out) for kernel in kernels), strict=True)
    inside, across = torch.stack(inside), torch.stack(across)
    parts = torch.zeros(len(kernels), len(held_out), y.shape[1], dtype=torch.float64)
    known = y[training] - y[training].mean(0)
    for number in candidate.unique().tolist():
        channels, weights = (candidate == number).nonzero()[:, 0], candidates[number]
        solved = Solver(torch.einsum("k,kij->ij", weights, inside), known[:, channels])
        alpha = solved.vectors @ solved.coefficients(penalty[channels])
        parts[:, :, channels] = weights[:, None, None] * (across @ alpha)
    return Fit(parts, validation, candidates[candidate], penalty)


class Solver:
    """(K + λ)⁻¹ y for every λ from one decomposition K = U diag(s) Uᵀ (n x n). known: y, n x V."""

    def __init__(self, kernel: Tensor, known: Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(kernel)
        self.values, self.projected = values.clamp_min(0), self.vectors.T @ known

    def coefficients(self, penalty: float | Tensor) -> Tensor:
        """Uᵀ α (n x V). penalty: λ, one or one a channel (V)."""
        return self.projected / (self.values[:, None] + penalty)


def centred(kernel: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of training samples (n x n), and of those held out with them (m x n), around the training mean."""
    inside, across = kernel[training[:, None], training], kernel[held_out[:, None], training]
    mean = inside.mean(0)
    return inside - mean - mean[:, None] + mean.mean(), across - mean - across.mean(1, keepdim=True) + mean.mean()


def blocks(training: Tensor, count: int, gap: int) -> list[tuple[Tensor, Tensor]]:
    """Contiguous blocks of the training samples, each with the others that are more than `gap` samples away."""
    found = []
    for block in training.tensor_split(count):
        if len(block):
            found.append((apart(training, block, gap), block))
    return found


def apart(samples: Tensor, block: Tensor, gap: int) -> Tensor:
    """The samples that are not within `gap` of a block of samples, nor in it."""
    near = (samples >= block.min() - gap) & (samples <= block.max() + gap)
    return samples[~near]


def candidates_for(bands: int, count: int, seed: int) -> Tensor:
    """Random γ on the simplex (C x K): each band alone, all alike, and draws, half of them sparse.

    Sparse ones are of Dirichlet(0.1), the others of Dirichlet(1), which is uniform. With one band there is one.
    """
    if bands == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    fixed = torch.cat([torch.eye(bands, dtype=torch.float64), torch.full((1, bands), 1 / bands, dtype=torch.float64)])
    generator = np.random.default_rng(seed)
    drawn = [generator.dirichlet([0.1 if number % 2 else 1.0] * bands) for number in range(count)]
    return torch.cat([fixed, torch.from_numpy(np.array(drawn))]) if drawn else fixed


def correlations(predicted: Tensor, observed: Tensor) -> Tensor:
    """Pearson's r of each channel (V) of two series (... m x V); 0 where either does not vary."""
    a, b = (x - x.mean(-2, keepdim=True) for x in (predicted.double(), observed.double()))
    lengths = a.norm(dim=-2) * b.norm(dim=-2)
    flat = (a.norm(dim=-2) <= 1e-12 * predicted.abs().amax(-2)) | (lengths == 0)
    return torch.where(flat, 0, (a * b).sum(-2) / lengths.clamp_min(torch.finfo(a.dtype).tiny))


def contributions(parts: Tensor, observed: Tensor) -> Tensor:
    """Product measure of each band (K x V): Σ_t ŷ_k (2 y - ŷ) / Σ_t y², which sums to R² over the bands.

    parts: K x m x V, observed: m x V. All are taken around their own means, so R² forgives a wrong offset.
    """
    y = observed.double() - observed.double().mean(0)
    parts = parts - parts.mean(1, keepdim=True)
    return (parts * (2 * y - parts.sum(0))).sum(1) / y.square().sum(0).clamp_min(torch.finfo(y.dtype).tiny)
