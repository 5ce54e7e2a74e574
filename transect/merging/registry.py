"""A merging is a function whose signature is its configuration: several trained models of one shape, and one comes out.

`@merging(name, ...)` registers `function(given, **settings)`, which returns the new model's tensors by name. It leaves
the given models as they are; what it needs to re-order it copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import TransectError
from ..parameters import Entry
from ..parameters import Range as Range
from ..statistics import Progress


@dataclass
class Given:
    """What a merging may know.

    models: two or more that fit (see `fit`). base: the model that they were trained from; None where there is none.
    told: what it has to say to the user, words and a number; the frame prints it.
    aligned: the models after the first, re-ordered so that they lie beside it; the frame draws a second curve to them.
    files: name -> function that writes it, for what belongs beside the merged model.
    """

    models: list[Anatomy]
    base: Anatomy | None = None
    seed: int = 0
    progress: Progress | None = None
    told: dict[str, float] = field(default_factory=dict)
    aligned: list[Anatomy] = field(default_factory=list)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of the seed, from their beginning."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def updates(self) -> list[dict[str, Tensor]]:
        """What each model has learned since the base: the differences, in float32."""
        assert self.base is not None  # the frame saw to it
        start = tensors_of(self.base.model)
        return [
            {name: tensor.float() - start[name].float() for name, tensor in tensors_of(one.model).items()}
            for one in self.models
        ]


@dataclass(frozen=True)
class Merging(Entry):
    """A registered merging.

    needs_base: whether it needs the model that the others were trained from.
    check: `check(given, **settings)`, called before any work; raises TransectError where it cannot be done.
    """

    family: ClassVar[str] = "merging"
    needs_base: bool = False
    check: Callable[..., None] | None = None


_mergings: dict[str, Merging] = {}


def merging(name: str, *, paper: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a merging; see `Merging` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _mergings[name] = Merging(name, paper, function, **more)
        return function

    return register


def merging_named(name: str) -> Merging:
    """The merging of that name, or an error that lists the known ones."""
    if name not in _mergings:
        raise TransectError(f"unknown way to merge {name!r}; known: {', '.join(sorted(_mergings))}")
    return _mergings[name]


def mergings() -> list[Merging]:
    """All registered mergings, by name."""
    return [_mergings[name] for name in sorted(_mergings)]


def tensors_of(model: Any) -> dict[str, Tensor]:
    """A model's numbers by name, each once however many names it has: parameters, and buffers that are stored."""
    stored = model.state_dict()
    buffers = {name: one for name, one in model.named_buffers() if name in stored and one.is_floating_point()}
    return {name: one.detach() for name, one in {**dict(model.named_parameters()), **buffers}.items()}


@torch.no_grad()
def write_tensors(model: Any, values: Mapping[str, Tensor]) -> None:
    """Write numbers of the same names into a model, each in the type that stands there."""
    for name, tensor in tensors_of(model).items():
        if name in values:
            tensor.copy_(values[name])
