"""A parametrization is a function whose signature is its configuration: it makes a linear layer's stand-in.

`@parametrization(name, ...)` registers `function(weight, bias, **settings) -> StandIn`. weight: W (d_out x d_in).
bias: b (d_out), or None. What it draws at random, it draws from torch's own generator, which is seeded for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import TransectError
from ...parameters import Entry
from .stand_in import StandIn, Together


@dataclass(frozen=True)
class Parametrization(Entry):
    """A registered parametrization.

    rate: the largest learning rate, where the user names none. rest: the other numbers of the model (embeddings, norms,
    biases) are trained, too. together: what the stand-ins of a model do together.
    """

    family: ClassVar[str] = "parametrization"
    size: ClassVar[str] = ""  # the setting that decides how many numbers are trained, of adapters
    merges: ClassVar[bool] = True
    rate: float
    rest: bool = True
    together: type[Together] = Together


_parametrizations: dict[str, Parametrization] = {}


def parametrization(name: str, *, paper: str, rate: float, **more: Any) -> Callable[..., Callable[..., StandIn]]:
    """Register a parametrization; see `Parametrization` for the fields."""

    def register(function: Callable[..., StandIn]) -> Callable[..., StandIn]:
        _parametrizations[name] = Parametrization(name, paper, function, rate, **more)
        return function

    return register


def parametrization_named(name: str) -> Parametrization:
    """The parametrization of that name, or an error that lists the known ones."""
    if name not in _parametrizations:
        raise TransectError(f"unknown parametrization {name!r}; known: {', '.join(sorted(_parametrizations))}")
    return _parametrizations[name]


def parametrizations() -> list[Parametrization]:
    """All registered parametrizations, by name."""
    return [_parametrizations[name] for name in sorted(_parametrizations)]
