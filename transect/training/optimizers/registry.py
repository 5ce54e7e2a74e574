"""An optimizer is a function whose signature is its configuration: it makes a `torch.optim.Optimizer`.

`@optimizer(name, ...)` registers `function(groups, lr, **settings)`. groups: as torch takes them, of named parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...errors import TransectError
from ...parameters import Entry

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Registered(Entry):
    """A registered optimizer."""

    family: ClassVar[str] = "optimizer"

    def build(self, groups: Groups, lr: float, given: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The optimizer of these groups, {"params": [(name, parameter), ...]}."""
        return self.function(groups, lr, **self.settings(given))


_optimizers: dict[str, Registered] = {}


def optimizer(name: str, *, paper: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an optimizer."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _optimizers[name] = Registered(name, paper, function)
        return function

    return register


def optimizer_named(name: str) -> Registered:
    """The optimizer of that name, or an error that lists the known ones."""
    if name not in _optimizers:
        raise TransectError(f"unknown optimizer {name!r}; known: {', '.join(sorted(_optimizers))}")
    return _optimizers[name]


def optimizers() -> list[Registered]:
    """All registered optimizers, by name."""
    return [_optimizers[name] for name in sorted(_optimizers)]
