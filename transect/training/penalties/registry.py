"""A penalty is a function whose signature is its configuration: what is added to the mean loss of a batch.

`@penalty(name, ...)` registers `function(seen, **settings) -> Tensor`, a scalar with gradient. seen: what the model has
just done with the batch, see `Seen`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import TransectError
from ...forward.objective import Batch
from ...parameters import Entry


@dataclass(frozen=True)
class Seen:
    """model: the Hugging Face model. batch: what it was given.

    states: the residual stream (B, T, d) in front of the first block and behind each, with gradient.
    """

    model: Any
    batch: Batch
    states: list[Tensor]


@dataclass(frozen=True)
class Penalty(Entry):
    """A registered penalty."""

    family: ClassVar[str] = "penalty"


_penalties: dict[str, Penalty] = {}


def penalty(name: str, *, paper: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a penalty."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _penalties[name] = Penalty(name, paper, function)
        return function

    return register


def penalty_named(name: str) -> Penalty:
    """The penalty of that name, or an error that lists the known ones."""
    if name not in _penalties:
        raise TransectError(f"unknown penalty {name!r}; known: {', '.join(sorted(_penalties))}")
    return _penalties[name]


def penalties() -> list[Penalty]:
    """All registered penalties, by name."""
    return [_penalties[name] for name in sorted(_penalties)]
