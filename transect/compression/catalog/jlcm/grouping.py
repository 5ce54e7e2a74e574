"""Rows whose weights are distributed alike: k-means over their quantiles (part 1 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

_QUANTILES = 16
_RESTARTS = 20
_ITERATIONS = 50


def group_rows(weight: Tensor, groups: int, seed: int) -> Tensor:
    """The group of each row of W (d_out x d_in), from 0 to groups - 1 (d_out).

    Rows are told apart by 16 of their quantiles, which one outlier does not move, unlike moments. How the paper does it
    is not known to us.
    """
    if groups == 1:
        return torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    middles = ((torch.arange(_QUANTILES) + 0.5) / _QUANTILES * weight.shape[1]).long().to(weight.device)
    return k_means(weight.sort(1).values[:, middles], groups, seed)


def k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each point (n x d), of the best of 20 restarts from different points drawn at random.

    A cluster without points moves to the point that is farthest from its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(points), generator=generator)[:clusters] for _ in range(_RESTARTS)])
    centres = points[drawn.to(points.device)]  # restarts x clusters x d
    for _ in range(_ITERATIONS):
        distances, nearest = torch.cdist(points, centres).min(2)  # restarts x n
        counts = torch.zeros(centres.shape[:2]).to(points).scatter_add_(1, nearest, torch.ones_like(distances))
        everyone = points.expand(len(centres), -1, -1)
        sums = torch.zeros_like(centres).scatter_add_(1, nearest[..., None].expand_as(everyone), everyone)
        moved = sums / counts.clamp_min(1)[..., None]
        for restart, cluster in (counts == 0).nonzero().tolist():
            farthest = distances[restart].argmax()
            moved[restart, cluster] = points[farthest]
            distances[restart, farthest] = 0
        if torch.equal(moved, centres):
            break
        centres = moved
    distances, nearest = torch.cdist(points, centres).min(2)
    return nearest[distances.square().sum(1).argmin()]
