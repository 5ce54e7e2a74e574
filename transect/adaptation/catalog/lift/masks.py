"""Which entries of a weight matrix are trained: the largest of its low-rank approximation, or of something simpler.

Positions are flat (row times d_in plus column), ascending, int64. W is d_out x d_in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Select = Literal["lift", "magnitude", "random"]


def budget(d_out: int, d_in: int, rank: int) -> int:
    """k = min((d_out + d_in) L, d_out d_in): as many entries as low-rank updates of rank L have numbers."""
    return min((d_out + d_in) * rank, d_out * d_in)


def largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores (d_out x d_in); of equal ones, those that come first."""
    flat = scores.flatten()
    least = flat.topk(count).values[-1]
    above = (flat > least).nonzero()[:, 0]
    level = (flat == least).nonzero()[: count - len(above), 0]
    return torch.cat([above, level]).sort().values


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of W of a rank R, in float32 (or in float64, if W is).

    W projected onto the leading R eigenvectors of its smaller Gram matrix. Random probes, which the released code can
    take instead, are not: in SmolLM2-135M, whose singular values fall off slowly, 2 R probes and two rounds of subspace
    iteration (Halko et al., 2009) find between a fifth and four fifths of the entries.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if rank >= min(wide.shape):
        return wide
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    leading = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:]
    close = (tall @ leading) @ leading.T
    return close if tall is wide else close.T


def principal(weight: Tensor, count: int, rank: int) -> Tensor:
    """LIFT: the largest entries, by size, of the approximation of rank `rank` (section 3 of the paper).

    The optimizer that was released takes the smallest under the settings that were published with it.
    """
    return largest(low_rank(weight, rank).abs(), count)


def by_magnitude(weight: Tensor, count: int) -> Tensor:
    """The largest entries of the weight itself, by size."""
    return largest(weight.abs(), count)


def by_gradient(gradient: Tensor, count: int) -> Tensor:
    """The entries with the largest gradients (d_out x d_in), by size."""
    return largest(gradient.abs(), count)


def by_movement(course: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """The entries that training moves away from zero most: the highest Σ -gradient · weight over its steps.

    course: (weight, gradient) of each step. The score of movement pruning (Sanh et al., 2020, equation 4).
    """
    return largest(torch.stack([-gradient * weight for weight, gradient in course]).sum(0), count)


def at_random(shape: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    """Entries drawn at random, the same for every matrix of a shape."""
    drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    return drawn.sort().values
