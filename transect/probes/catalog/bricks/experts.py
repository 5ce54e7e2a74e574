"""Whether the neurons of a kind lie together in groups of neurons that read alike (functional experts)."""

from __future__ import annotations

import torch
from scipy.stats import hypergeom
from torch import Tensor
from torch.nn import functional

from ....anatomy import Block
from ....anatomy.grouping import alike
from ...neurons import vectors

TOP = 0.01  # share of a layer's neurons that are a kind's
TAIL = 0.001  # of the hypergeometric law
SIZE = 32  # neurons of a group, about
PARTITIONS = 200  # at random


def groups_of(block: Block, generator: torch.Generator) -> Tensor | None:
    """The group of each neuron (n), of one size each, near 32: balanced k-means of the rows by which they read.

    Rows of gate and up, each at length 1. None where the neurons cannot be divided into two groups at least.
    """
    found = [rows for rows in (vectors(block, "gate"), vectors(block, "up")) if rows is not None]
    rows = functional.normalize(torch.cat([functional.normalize(part, dim=1) for part in found], 1), dim=1)
    sizes = [size for size in range(2, len(rows) // 2 + 1) if len(rows) % size == 0]
    if not sizes:
        return None
    size = min(sizes, key=lambda one: abs(one - SIZE))
    return alike(rows, len(rows) // size, generator).cpu()


def threshold(neurons: int, groups: int, top: int) -> int:
    """The count that a group of neurons / groups exceeds with a probability of at most 0.1 %, if `top` are drawn."""
    return int(hypergeom.isf(TAIL, neurons, neurons // groups, top))


def enrichment(group: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each kind (C): the share of groups that are its experts, and the mean count of its neurons in these over that
    by chance (NaN without any).

    group: of each neuron (n). scores: C x n; a kind's neurons are the best hundredth.
    """
    neurons, groups = len(group), int(group.max()) + 1
    top = max(1, round(TOP * neurons))
    best = scores.topk(top, dim=1).indices  # C x top
    counts = functional.one_hot(group[best], groups).sum(1)  # C x groups
    expert = counts > threshold(neurons, groups, top)
    number = expert.sum(1)
    inside = (counts * expert).sum(1).double() / number  # NaN for none
    return number.double() / groups, inside * groups / top


def by_chance(group: Tensor, top: int, generator: torch.Generator) -> float:
    """The share of groups that are experts where neurons are put into groups at random; mean of 200 partitions."""
    groups = int(group.max()) + 1
    limit, found = threshold(len(group), groups, top), 0
    for _ in range(PARTITIONS):
        drawn = group[torch.randperm(len(group), generator=generator)[:top]]
        found += int((drawn.bincount(minlength=groups) > limit).sum())
    return found / (PARTITIONS * groups)
