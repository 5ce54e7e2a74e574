"""Families of Boolean functions, and how inputs for them are drawn (arXiv:2310.03016, Appendix of its tasks).

Inputs x are -1 or +1 (count x m x n). A function is its weights, drawn for each sequence; w_j = +1 and -1 stand for the
literals x_j and not x_j, 0 for none. A conjunction without literals is true, a disjunction without any false; they are
kept, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Generator = torch.Generator


def all_true(w: Tensor, x: Tensor) -> Tensor:
    """Whether all literals of w (... x n) are true of x (... x n)."""
    return (w * x).sum(-1) >= w.abs().sum(-1)


def any_true(w: Tensor, x: Tensor) -> Tensor:
    """Whether some literal of w is true of x."""
    return (w * x).sum(-1) > -w.abs().sum(-1)


def _odd(w: Tensor, x: Tensor) -> Tensor:
    return ((x > 0) * w).sum(-1) % 2 == 1


@dataclass(frozen=True)
class Family:
    """weights: (count, n, generator) -> w (count x c x k), c clauses of each function. value: (w (count x 1 x c x k), x
    (count x m x 1 x n)) -> whether the function is true (count x m).
    forced, share: so many of the inputs are made such that one clause, the same for the whole sequence, has all its
    literals true (1) or false (-1). taught: whether the sequence begins with the clauses' teaching sequences, and of
    literals without negation alone (`monotone`) or of all.
    """

    weights: Callable[[int, int, Generator], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    share: float = 0.0
    forced: int = 1
    taught: str = ""


def _literals(clauses: int, share: float, negated: bool = True) -> Callable[[int, int, Generator], Tensor]:
    """Weights of which each is a literal with that chance, and then negated with a half."""

    def draw(count: int, bits: int, generator: Generator) -> Tensor:
        chosen = torch.rand(count, clauses, bits, generator=generator) < share
        signs = 2.0 * torch.randint(2, chosen.shape, generator=generator) - 1 if negated else torch.ones(())
        return chosen * signs

    return draw


def _subset(size: int) -> Callable[[int, int, Generator], Tensor]:
    """So many of the bits, without negation."""

    def draw(count: int, bits: int, generator: Generator) -> Tensor:
        order = torch.rand(count, bits, generator=generator).argsort(dim=1)
        return (order < size).float()[:, None]  # the places of the numbers 0 to size - 1 in a random order

    return draw


def _whole_numbers(count: int, bits: int, generator: Generator) -> Tensor:
    return torch.randint(-3, 4, (count, 1, bits), generator=generator).float()


def _with_threshold(count: int, bits: int, generator: Generator) -> Tensor:
    """The weights of a conjunction, and behind them the threshold."""
    threshold = torch.randint(-3, 3, (count, 1, 1), generator=generator) + 0.5
    return torch.cat([_literals(1, 0.3)(count, bits, generator), threshold], dim=-1)


def _above_half(w: Tensor, x: Tensor) -> Tensor:
    return ((w * x).sum(-1) > 0.5).any(-1)


_CONJUNCTION, _CLAUSES = _literals(1, 0.3), _literals(3, 0.2)

FAMILIES: dict[str, Family] = {
    "conjunction": Family(_CONJUNCTION, lambda w, x: all_true(w, x).any(-1), 0.3),
    "disjunction": Family(_CONJUNCTION, lambda w, x: any_true(w, x).all(-1), 0.3, -1),
    "sparse-disjunction": Family(_subset(4), lambda w, x: any_true(w, x).all(-1), 0.3, -1),
    "dnf": Family(_CLAUSES, lambda w, x: all_true(w, x).any(-1), 0.35),
    "cnf": Family(_CLAUSES, lambda w, x: any_true(w, x).all(-1), 0.3, -1),
    "majority": Family(_literals(1, 0.3, negated=False), _above_half),
    "integer-halfspace": Family(_whole_numbers, _above_half),
    "threshold": Family(_with_threshold, lambda w, x: ((w[..., :-1] * x).sum(-1) > w[..., -1]).any(-1)),
    "parity": Family(_literals(1, 0.5, negated=False), lambda w, x: _odd(w, x).any(-1)),
    "sparse-parity": Family(_subset(2), lambda w, x: _odd(w, x).any(-1)),
    "monotone-teaching": Family(
        _literals(1, 0.3, negated=False), lambda w, x: all_true(w, x).any(-1), 0.4, taught="monotone"
    ),
    "conjunction-teaching": Family(_CONJUNCTION, lambda w, x: all_true(w, x).any(-1), 0.4, taught="all"),
    "dnf-teaching": Family(_CLAUSES, lambda w, x: all_true(w, x).any(-1), 0.4, taught="all"),
}  # fmt: skip


def drawn_from(family: str, count: int, points: int, bits: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Inputs (count x m x n) and labels (count x m), both -1 or +1, a function of the family for each sequence."""
    x = 2.0 * torch.randint(2, (count, points, bits), generator=generator) - 1
    if family == "nearest-neighbour":
        return x, _by_neighbours(x, points // 2, generator)
    one = FAMILIES[family]
    w = one.weights(count, bits, generator)
    if one.share:
        picked = torch.randint(w.shape[1], (count, 1, 1), generator=generator).expand(-1, -1, bits)
        clause = w.gather(1, picked)  # count x 1 x n
        forced = torch.rand(count, points, 1, generator=generator) < one.share
        x = torch.where(forced & (clause != 0), one.forced * clause, x)
    if one.taught:
        x = _after(*teaching(w, one.taught == "monotone"), x)
    return x, 2.0 * one.value(w[:, None], x[:, :, None]) - 1


def teaching(w: Tensor, monotone: bool) -> tuple[Tensor, Tensor]:
    """The examples that single a conjunction out in its class, of each clause, and which of them there are.

    First the literals true and all other bits -1 (and then, where literals may be negated, +1); then each literal false
    in its turn. (count x c t x n) and (count x c t).
    """
    count, _, bits = w.shape
    low = torch.where(w != 0, w, -1.0)[:, :, None]
    turned = low * (1 - 2 * torch.eye(bits))  # row j has bit j the other way round
    first = low if monotone else torch.cat([low, torch.where(w != 0, w, 1.0)[:, :, None]], dim=2)
    there = torch.cat([torch.ones(first.shape[:3], dtype=torch.bool), w != 0], dim=2)
    return torch.cat([first, turned], dim=2).view(count, -1, bits), there.view(count, -1)


def _after(taught: Tensor, there: Tensor, x: Tensor) -> Tensor:
    """The inputs, in the place of whose first ones stand those of `taught` that are there."""
    order = (~there).long().argsort(dim=1, stable=True)[:, :, None].expand_as(taught)
    front = torch.arange(order.shape[1]) < there.sum(dim=1, keepdim=True)
    head = torch.where(front[:, :, None], taught.gather(1, order), x[:, : order.shape[1]])
    return torch.cat([head, x[:, order.shape[1] :]], dim=1)


def _by_neighbours(x: Tensor, known: int, generator: Generator) -> Tensor:
    """Random labels for the first ones, but one input one label; then that of the nearest before, the first on ties."""
    labels = 2.0 * torch.randint(2, x.shape[:2], generator=generator) - 1
    likeness = x @ x.mT  # of vectors of one length it is their cosine's order
    for i in range(1, x.shape[1]):
        nearest = likeness[:, i, :i].argmax(dim=1, keepdim=True)
        copied = labels.gather(1, nearest)[:, 0]
        seen = likeness[:, i, :i].gather(1, nearest)[:, 0] == x.shape[2]
        labels[:, i] = torch.where(seen | torch.tensor(i >= known), copied, labels[:, i])
    return labels
