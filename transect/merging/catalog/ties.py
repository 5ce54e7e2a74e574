"""What several models have learned, without its small numbers and without those that pull against the majority."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..registry import Given, Range, merging, tensors_of


@merging("ties", paper="arXiv:2306.01708", needs_base=True)
def ties(
    given: Given,
    *,
    keep: Annotated[float, Range(0, 1, above=True)] = 0.2,
    scale: Annotated[float, Range(-10, 10)] = 1.0,
) -> dict[str, Tensor]:
    """Trim what each model has learned, elect a sign for every number, and add the mean of those that agree.

    With τ_k = θ_k - θ_0: of each τ_k the largest numbers stay (over all tensors together); γ = sign Σ_k τ_k; the result
    is θ_0 + scale · mean of the τ_k that are not 0 and have the sign γ (Yadav et al. 2023, algorithm 1).

    keep: share of the numbers of each model that stay.
    scale: of what is added.
    """
    assert given.base is not None  # the frame saw to it
    updates = [trimmed(one, keep) for one in given.updates]
    found = {}
    for name, start in tensors_of(given.base.model).items():
        stacked = torch.stack([one[name] for one in updates])  # models x the tensor's shape
        found[name] = start.float() + scale * elected_mean(stacked)
    return found


def trimmed(update: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The numbers that are among the largest of all tensors; zeros elsewhere. At least one stays."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in update.values()])
    least = sizes.kthvalue(len(sizes) - max(1, round(keep * len(sizes))) + 1).values
    return {name: tensor * (tensor.abs() >= least) for name, tensor in update.items()}


def elected_mean(updates: Tensor) -> Tensor:
    """For every number, the mean over the models (first dimension) of those with the sign of the sum; 0 for none."""
    agree = (updates.sign() == updates.sum(0).sign()) & (updates != 0)
    return (updates * agree).sum(0) / agree.sum(0).clamp_min(1)
