"""How well any model could predict a channel, from repeats of one recording or from other subjects'.

Shapes: R repeats or subjects, N samples, V channels.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .banded import apart, candidates_for, correlations, fit

LEAST = 0.05  # ceilings below this normalise nothing, as in the paper
BOOTSTRAPS = 100
SUBSETS = 10  # of other subjects, of each size
_RISES = 60  # values of τ₀ that are tried


def from_repeats(responses: Tensor) -> Tensor:
    """Largest r with the mean over repeats that a perfect prediction of what repeats has (V), 0 without any signal.

    r² = variance of the signal / variance of the mean, where the variance of the signal is the mean covariance of two
    repeats. For repeats of the same signal with independent noise of the same strength. responses: R x N x V, R > 1.
    """
    count = len(responses)
    mean = responses.mean(0).var(0)
    signal = (count**2 * mean - responses.var(1).sum(0)) / (count * (count - 1))
    return (signal.clamp_min(0) / mean.clamp_min(torch.finfo(mean.dtype).tiny)).sqrt().clamp_max(1)


def from_subjects(responses: Tensor, training: Tensor, held_out: Tensor, gap: int, seed: int) -> Tensor:
    """Largest r with each subject's channels, from predicting them by other subjects' (R x V); R of 3 or more.

    Ridge regression as for the model's features, from all channels of x other subjects, x = 1 ... R - 1, in up to ten
    subsets of each size; v(x) = v₀ (1 - e^(-x / τ₀)) is fitted to r over x, 100 times on resampled subsets; the ceiling
    is the median v₀, between 0 and 1. Ours: τ₀ is at most R - 1, so the ceiling at most 1.6 times what all other
    subjects reach; without a bound, a rise by chance is extrapolated to anything.
    """
    generator = np.random.default_rng(seed)
    kernels = torch.stack([_kernel(one, training) for one in responses])
    kept = apart(training, held_out, gap)
    found = []
    for subject in range(len(responses)):
        others = [other for other in range(len(responses)) if other != subject]
        points: list[list[Tensor]] = []
        for size in range(1, len(others) + 1):
            subsets = list(combinations(others, size))
            if len(subsets) > SUBSETS:
                subsets = [subsets[n] for n in generator.choice(len(subsets), SUBSETS, replace=False)]
            points.append([])
            for subset in subsets:
                kernel = kernels[list(subset)].mean(0, keepdim=True)
                made = fit(kernel, responses[subject], kept, held_out, candidates=candidates_for(1, 0, 0), gap=gap)
                points[-1].append(correlations(made.predicted, responses[subject][held_out]))
        found.append(_asymptote(points, generator))
    return torch.stack(found)


def _kernel(responses: Tensor, training: Tensor) -> Tensor:
    """Inner products (N x N) of standardised channels, with a mean diagonal of 1."""
    x = (responses - responses[training].mean(0)) / responses[training].std(0).clamp_min(1e-12)
    kernel = x @ x.T
    return kernel / kernel.diagonal().mean()


def _asymptote(points: list[list[Tensor]], generator: np.random.Generator) -> Tensor:
    """Median v₀ (V) over resamplings. points: for each number of subjects, r (V) of every subset.

    For a given τ₀ the best v₀ is that of least squares in one unknown; the τ₀ of the smallest error is taken.
    """
    sizes = torch.arange(1, len(points) + 1, dtype=torch.float64)
    rises = torch.logspace(-1.3, math.log10(len(points)), _RISES, dtype=torch.float64)
    shapes = 1 - torch.exp(-sizes / rises[:, None])  # τ x sizes
    found = []
    for _ in range(BOOTSTRAPS):
        drawn = [torch.stack([one[n] for n in generator.integers(len(one), size=len(one))]).mean(0) for one in points]
        r = torch.stack(drawn)  # sizes x V
        v = (shapes @ r / shapes.square().sum(1, keepdim=True)).clamp(0, 1)  # τ x V
        errors = (r - v[:, None] * shapes[:, :, None]).square().sum(1)
        found.append(v.gather(0, errors.argmin(0)[None])[0])
    return torch.stack(found).median(0).values
