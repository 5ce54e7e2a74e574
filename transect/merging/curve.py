"""The loss on the straight line between two models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy import Anatomy
from ..data import Batches
from ..evaluation import evaluate_loss
from ..statistics import Progress
from .registry import tensors_of, write_tensors
from .shares import mean_of


@dataclass(frozen=True)
class Curve:
    """Losses (nats a prediction) at (1 - s) θ_A + s θ_B. shares: s, from 0 to 1, evenly spaced."""

    shares: list[float]
    losses: list[float]

    @property
    def barrier(self) -> float:
        """How far the loss rises above the straight line between its ends, at most; never below 0."""
        return barrier_of(self.shares, self.losses)


def barrier_of(shares: Sequence[float], losses: Sequence[float]) -> float:
    """max_s L(s) - ((1 - s) L(0) + s L(1))."""
    first, last = losses[0], losses[-1]
    return max(loss - ((1 - share) * first + share * last) for share, loss in zip(shares, losses, strict=True))


def points_of(count: int) -> list[float]:
    """So many shares from 0 to 1, evenly spaced."""
    return [number / (count - 1) for number in range(count)]


def curve_of(a: Anatomy, b: Anatomy, batches: Batches, points: int, progress: Progress | None = None) -> Curve:
    """The curve from A to B on held-out data; the models stay as they are."""
    between = copy.deepcopy(a.model)
    ends = tensors_of(a.model), tensors_of(b.model)

    def loss(share: float) -> float:
        write_tensors(between, mean_of(ends, (1 - share, share)))
        return evaluate_loss(between, batches).loss

    shares = points_of(points)
    return Curve(shares, [loss(share) for share in (progress(shares, "curve") if progress else shares)])


@torch.no_grad()
def curve_of_module(a: Any, b: Any, loss: Callable[[Any], float], points: int) -> Curve:
    """The same for any two modules with the same parameters, and any loss of one."""
    between = copy.deepcopy(a)
    ends = [dict(one.named_parameters()) for one in (a, b)]
    shares, losses = points_of(points), []
    for share in shares:
        for name, tensor in mean_of(ends, (1 - share, share)).items():
            between.get_parameter(name).copy_(tensor)
        losses.append(loss(between))
    return Curve(shares, losses)
