"""An objective is a function whose signature is its configuration: it makes a `Goal` for a model and its tokenizer.

`@objective(name, ...)` registers `function(opened, **settings) -> Goal`. opened: the model with its tokenizer, see
`transect.checkpoint.Opened`; a wrong choice is a TransectError here, before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..checkpoint import Opened
from ..errors import TransectError
from ..parameters import Entry
from .goal import Goal


@dataclass(frozen=True)
class Objective(Entry):
    """A registered objective. score: what the share of right examples is called; empty where it says little."""

    score: str = ""
    family: ClassVar[str] = "objective"

    def goal(self, opened: Opened, given: Mapping[str, Any]) -> Goal:
        """The objective for this model."""
        return self.function(opened, **self.settings(given))


_objectives: dict[str, Objective] = {}


def objective(name: str, *, paper: str, score: str = "") -> Callable[[Callable[..., Goal]], Callable[..., Goal]]:
    """Register an objective; see `Objective` for the fields."""

    def register(function: Callable[..., Goal]) -> Callable[..., Goal]:
        _objectives[name] = Objective(name, paper, function, score)
        return function

    return register


def objective_named(name: str) -> Objective:
    """The objective of that name, or an error that lists the known ones."""
    if name not in _objectives:
        raise TransectError(f"unknown objective {name!r}; known: {', '.join(sorted(_objectives))}")
    return _objectives[name]


def objectives() -> list[Objective]:
    """All registered objectives, by name."""
    return [_objectives[name] for name in sorted(_objectives)]
