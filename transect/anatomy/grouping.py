"""Neurons in groups of one size: balanced k-means of a vector that each has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROUNDS = 10


def alike(rows: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """The group of each row (n), n / groups of them in each: k-means of directions, with groups of one size.

    rows: n x d, at length 1. generator: of the rows that the centres begin with.
    """
    centres = rows[torch.randperm(len(rows), generator=generator)[:groups].to(rows.device)]
    for _ in range(ROUNDS):
        group = balanced(rows @ centres.T, len(rows) // groups)
        sums = torch.zeros_like(centres).index_add(0, group, rows)
        centres = functional.normalize(sums, dim=-1)
    return balanced(rows @ centres.T, len(rows) // groups)


def balanced(scores: Tensor, size: int) -> Tensor:
    """The group of each row, `size` rows in each: no row and group would both gain by another choice.

    scores: (rows x groups), with rows = size x groups. Rows ask for the best group that has not refused them, groups
    keep the best that ask (Gale and Shapley 1962).
    """
    left = scores.clone()
    while True:
        group = left.argmax(dim=1)
        crowded = [number for number in range(scores.shape[1]) if int((group == number).sum()) > size]
        if not crowded:
            return group
        for number in crowded:
            asking = (group == number).nonzero()[:, 0]
            refused = asking[scores[asking, number].argsort(descending=True, stable=True)[size:]]
            left[refused, number] = -torch.inf
