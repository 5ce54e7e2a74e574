"""A search method is a function whose signature is its configuration: it picks one network of a space.

`@searching(name, ...)` registers `function(task, **settings) -> Found`. It may train the weights of the space's model,
in place; sorting the units before, and cutting and judging afterwards, is done for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..errors import TransectError
from ..forward import Batch
from ..parameters import Entry
from ..training import Course, Machine, Run, Schedule
from .space import Picked, Space, Weights

if TYPE_CHECKING:
    from .settings import Settings
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


@dataclass(frozen=True)
class Searcher(Entry):
    """A registered search method."""

    family: ClassVar[str] = "search"


_searchers: dict[str, Searcher] = {}


def searching(name: str, *, paper: str) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Register a search method."""

    def register(function: Callable[..., Found]) -> Callable[..., Found]:
        _searchers[name] = Searcher(name, paper, function)
        return function

    return register


def searcher(name: str) -> Searcher:
    """The search method of that name, or an error that lists the known ones."""
    if name not in _searchers:
        raise TransectError(f"unknown search method {name!r}; known: {', '.join(sorted(_searchers))}")
    return _searchers[name]


def searchers() -> list[Searcher]:
    """All registered search methods, by name."""
    return [_searchers[name] for name in sorted(_searchers)]
