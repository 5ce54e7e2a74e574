"""What a check of a description is, and the small model that it is made on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Anatomy, Architecture
from ...errors import TransectError
from .twin import batch_for

# Of the largest value. Norms compute in float32 inside; a wrong description is off by a hundredth or more.
LIMIT = 1e-4


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    what: a sentence. keys: of the description, where to look if it does not. error: relative to the largest value;
    None where it could not be measured. note: why not.
    """

    what: str
    keys: tuple[str, ...]
    error: float | None
    note: str = ""
    applies: bool = True

    @property
    def passed(self) -> bool:
        return not self.applies or (self.error is not None and self.error <= LIMIT)

    @property
    def complaint(self) -> str:
        """What is wrong, and where to look."""
        how = self.note if self.error is None else f"off by {self.error:.2g} of the largest value"
        return f"{self.what}: {how} (look at {', '.join(f'`{key}`' for key in self.keys)})"


@dataclass
class Bench:
    """A small model under a description, and what it does before anything is changed."""

    model: Any
    architecture: Architecture
    batch: dict[str, Tensor] = field(init=False)
    output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.batch = batch_for(self.model)
        self.output = self.run(self.model)

    @property
    def anatomy(self) -> Anatomy:
        return Anatomy(self.model, self.architecture)

    def copy(self) -> Anatomy:
        """A copy of the model that may be changed."""
        return Anatomy(copy.deepcopy(self.model), self.architecture)

    @contextmanager
    def overwritten(self) -> Iterator[Anatomy]:
        """The model itself, for changes of numbers alone, which end with the `with`: sooner made than a copy."""
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        try:
            yield self.anatomy
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.model.parameters(), weights, strict=True):
                    parameter.copy_(weight)

    @torch.no_grad()
    def run(self, model: Any) -> Tensor:
        """Logits, or the last state of a model without a head."""
        output = model(**self.batch)
        return output[0] if getattr(output, "logits", None) is None else output.logits

    def off(self, anatomy: Anatomy, reference: Anatomy | None = None) -> float:
        """How far a changed model is from another, or from the unchanged one."""
        return distance(self.run(anatomy.model), self.output if reference is None else self.run(reference.model))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinity where something is not finite or has no value."""
    if found.shape != expected.shape:
        raise TransectError(f"the shape is {tuple(found.shape)}, and should be {tuple(expected.shape)}")
    worst = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(worst) if torch.isfinite(worst) else float("inf")


CHECKS: list[tuple[str, tuple[str, ...], Callable[[Bench], float]]] = []


def check(what: str, *keys: str) -> Callable[[Callable[[Bench], float]], Callable[[Bench], float]]:
    """Decorator: registers a check; they are made in the order in which they are registered."""

    def register(function: Callable[[Bench], float]) -> Callable[[Bench], float]:
        CHECKS.append((what, keys, function))
        return function

    return register


def matters(change: Tensor) -> bool:
    """Whether a change is more than rounding."""
    return bool(change.abs().max() > 1e-6)


class Hooks:
    """A list of handles of hooks, which are removed at the end."""

    def __enter__(self) -> list[Any]:
        self.handles: list[Any] = []
        return self.handles

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
