"""A conversion is a function whose signature is its configuration: it puts a trained model's weights into other parts.

`@conversion(name, ...)` registers `function(anatomy, calibration, **settings)`. It changes the model in place, or
returns another one; numbers that it draws come from `calibration.generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..errors import TransectError
from ..parameters import Entry
from ..parameters import Range as Range
from ..statistics import Progress
from .stage import Stage


@dataclass
class Calibration:
    """What a conversion may know besides the model.

    data: training text as `transect.data.Batches`; None where the user gave none. seed: of whatever it draws.
    told: what it has to say to the user, words and a number; the frame prints it.
    """

    data: Any = None
    seed: int = 0
    progress: Progress | None = None
    told: dict[str, float] = field(default_factory=dict)

    @property
    def batches(self) -> Any:
        """The data, or an error if there are none."""
        if self.data is None:
            raise TransectError("this conversion runs the model on text: pass data= (--data)")
        return self.data

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of the seed, from their beginning."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Conversion(Entry):
    """A registered conversion.

    group: what it is for, a few words that head a list. exact: in a sentence, what is the same as in the model that it
    came from before any training; a test holds it to that.
    check: `check(anatomy, **settings)`, called before any change; raises TransectError where it cannot be done.
    stages: the training that its paper prescribes, or a function of the settings that gives it; none for a rewrite that
    loses nothing. causal: whether it is for models alone that predict the next token. after: called with the trained
    model and what the conversion knew, to tell the user what came of it.
    """

    family: ClassVar[str] = "conversion"
    group: str
    exact: str
    check: Callable[..., None]
    stages: Sequence[Stage] | Callable[..., Sequence[Stage]] = ()
    causal: bool = True
    after: Callable[[Any, Calibration], None] | None = None

    def training(self, settings: dict[str, Any]) -> list[Stage]:
        """The stages of its training with these settings."""
        return list(self.stages(**settings) if callable(self.stages) else self.stages)


_conversions: dict[str, Conversion] = {}


def conversion(name: str, *, paper: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a conversion; see `Conversion` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _conversions[name] = Conversion(name, paper, function, **more)
        return function

    return register


def conversion_named(name: str) -> Conversion:
    """The conversion of that name, or an error that lists the known ones."""
    if name not in _conversions:
        raise TransectError(f"unknown conversion {name!r}; known: {', '.join(sorted(_conversions))}")
    return _conversions[name]


def conversions() -> list[Conversion]:
    """All registered conversions, by group and name."""
    return sorted(_conversions.values(), key=lambda one: (one.group, one.name))
