"""Learners that are no models: what each says of example i from those before it. Inputs x (count x m x n) and labels
(count x m) are -1 or +1, and so is what they say, or 0 where they say nothing, which is wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nearest(x: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """The sign of the sum of the labels of the so many nearest before; of equally near ones the earliest."""
    points = x.shape[1]
    earlier = torch.ones(points, points, dtype=torch.bool).tril(-1)
    likeness = (x @ x.mT).masked_fill(~earlier, -torch.inf)
    order = likeness.argsort(dim=2, descending=True, stable=True)[:, :, :neighbours]
    there = likeness.gather(2, order) > -torch.inf
    near = labels[:, None, :].expand_as(likeness).gather(2, order)
    return (near * there).sum(-1).sign()


def averaging(x: Tensor, labels: Tensor) -> Tensor:
    """The sign of x · (sum of y x over those before)."""
    weighted = (labels[:, :, None] * x).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(weighted[:, :1]), weighted[:, :-1]], dim=1)
    return (before * x).sum(-1).sign()


def elimination(x: Tensor, labels: Tensor, monotone: bool = False) -> Tensor:
    """Of conjunctions: all literals at first, less those that were false where the label was +1. It says +1 where all
    that are left are true, so that it is never wrong where it says so.

    monotone: literals without negation alone.
    """
    false = x < 0 if monotone else torch.cat([x < 0, x > 0], dim=2)  # of the literals x_j, and then of not x_j
    gone = (false & (labels > 0)[:, :, None]).long().cumsum(dim=1) > 0
    before = torch.cat([torch.zeros_like(gone[:, :1]), gone[:, :-1]], dim=1)
    return 1.0 - 2.0 * (false & ~before).any(dim=2)


def parities(x: Tensor, labels: Tensor) -> Tensor:
    """Gaussian elimination over GF(2): certain where the input is a sum of those before, else what one of the parities
    says that agree with all so far."""
    count, points, bits = x.shape
    rows, odd = (x > 0), labels > 0
    basis = torch.zeros(count, bits, bits, dtype=torch.bool)  # row j begins with bit j, or is empty
    sums = torch.zeros(count, bits, dtype=torch.bool)
    said = []
    for i in range(points):
        left, value = rows[:, i].clone(), torch.zeros(count, dtype=torch.bool)
        for j in range(bits):
            taken = left[:, j] & basis[:, j, j]
            left ^= basis[:, j] & taken[:, None]
            value ^= sums[:, j] & taken
        said.append(2.0 * value - 1)
        new = left.any(dim=1)
        at = left.long().argmax(dim=1)
        which = new.nonzero()[:, 0]
        basis[which, at[which]] = left[which]
        sums[which, at[which]] = (value ^ odd[:, i])[which]
    return torch.stack(said, dim=1)


LEARNERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1 neighbour": lambda x, labels: nearest(x, labels, 1),
    "3 neighbours": lambda x, labels: nearest(x, labels, 3),
    "averaging": averaging,
    "elimination": elimination,
    "elimination without negation": lambda x, labels: elimination(x, labels, monotone=True),
    "elimination of the opposite": lambda x, labels: -elimination(x, -labels),
    "Gaussian elimination": parities,
}
_EXACT = {
    "conjunction": "elimination", "conjunction-teaching": "elimination",
    "monotone-teaching": "elimination without negation", "disjunction": "elimination of the opposite",
    "sparse-disjunction": "elimination of the opposite", "parity": "Gaussian elimination",
    "sparse-parity": "Gaussian elimination",
}  # fmt: skip


def learners_of(family: str) -> list[str]:
    """The learners for a family: those for all, and the exact one where there is one."""
    return ["1 neighbour", "3 neighbours", "averaging", *([_EXACT[family]] if family in _EXACT else [])]
