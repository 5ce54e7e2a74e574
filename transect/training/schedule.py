"""How long a training goes, and how large its steps are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Shape = Literal["cosine", "linear", "constant", "late"]


@dataclass(frozen=True)
class Schedule:
    """lr: the largest learning rate. epochs: passes over the batches. steps: no more optimizer steps than this.

    accumulate: batches in a step. every: measure the held-out loss, and write the state, every so many steps; default a
    tenth of all. warm_up: share of the steps in which the rate rises. shape: how it goes down to 0 afterwards; "late"
    stays for half of that time and goes in a line to 1 % at 90 % of it (Garipov et al. 2018, for curves).
    clip: largest norm of a step's gradient; None for no limit.
    optimizer: the name of a registered one. options: its settings. seed: of the batches' order and of dropout.
    shuffle: take the batches of an epoch in an order of its own; otherwise as they come.
    """

    lr: float
    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    every: int | None = None
    warm_up: float = 0.05
    shape: Shape = "cosine"
    clip: float | None = 1.0
    optimizer: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    shuffle: bool = True

    def total(self, per_epoch: int) -> int:
        """The number of steps."""
        most = self.epochs * per_epoch
        return most if self.steps is None else min(self.steps, most)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step 0 ... total - 1: a linear rise, and then the shape."""
        rising = math.ceil(self.warm_up * total)
        if step < rising:
            return self.lr * (step + 1) / rising
        gone = (step - rising) / max(1, total - rising)
        late = min(1.0, max(0.01, 1 - 0.99 * (gone - 0.5) / 0.4))
        cosine = 0.5 * (1 + math.cos(math.pi * gone))
        down = {"cosine": cosine, "linear": 1 - gone, "constant": 1.0, "late": late}
        return self.lr * down[self.shape]
