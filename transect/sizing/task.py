"""What a search method is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..forward import Batch
from ..training import Course, Machine, Run, Schedule
from .settings import Settings
from .space import Picked, Space, Weights
from .super_network import SuperNetwork


@dataclass(frozen=True)
class Task:
    """What a search method is given.

    training: this process's share of each batch that weights are trained on. validation: of those that choose sizes.
    run: makes what `training.train` needs of a schedule.
    """

    space: Space
    settings: Settings
    training: Sequence[Batch | None]
    validation: Sequence[Batch | None]
    machine: Machine
    run: Callable[[Schedule], Run]
    tokens: Sequence[int] = ()

    def price(self, numbers: Tensor) -> Tensor:
        """The penalty in nats for a network, or a mixture of them, of so many numbers; see `Settings.penalty`."""
        return self.settings.penalty * (numbers / self.space.whole - (self.settings.keep or 0.0)).clamp_min(0)


@dataclass(frozen=True)
class Found:
    """picked: the network. weights: what the method thinks of every choice, summing to 1 on each axis; empty if it does
    not say. network: the super-network, of which these weights are a mixture. notes: further numbers, as JSON."""

    picked: Picked
    course: Course
    weights: Weights = field(default_factory=dict)
    network: SuperNetwork | None = None
    notes: dict[str, Any] = field(default_factory=dict)
