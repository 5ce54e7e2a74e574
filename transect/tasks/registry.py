"""A task is a function whose signature is its configuration: it draws examples.

`@task(name, ...)` registers `function(count, generator, **settings) -> Drawn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data import Batches
from ..errors import TransectError
from ..forward.objective import IGNORED
from ..parameters import Entry


@dataclass(frozen=True)
class Drawn:
    """Examples. tokens: ids (count x T), or images: pixels (count x C x H x W) with classes.

    vocabulary: how many ids there are, or classes of images. answers: of tokens, the positions (count x T, true where)
    whose token the positions before it have to give; of images, the class of each (count).
    """

    inputs: Tensor
    answers: Tensor
    vocabulary: int

    @property
    def images(self) -> bool:
        """Whether the inputs are images."""
        return self.inputs.is_floating_point()

    def batches(self, size: int) -> Batches:
        """The same, `size` examples at a time, as a model's forward and the loss take them."""
        if self.images:
            rows = {"pixel_values": self.inputs, "labels": self.answers}
        else:
            rows = {"input_ids": self.inputs, "labels": self.inputs.masked_fill(~self.answers, IGNORED)}
        starts = range(0, len(self.inputs), size)
        return Batches([{name: tensor[start : start + size] for name, tensor in rows.items()} for start in starts])


@dataclass(frozen=True)
class Task(Entry):
    """A registered task."""

    family: ClassVar[str] = "task"

    def draw(self, count: int, seed: int, given: Mapping[str, Any] | None = None) -> Drawn:
        """`count` examples; other seeds give others."""
        if count < 1:
            raise TransectError(f"{self.name}: at least one example is to be drawn, not {count}")
        return self.function(count, torch.Generator().manual_seed(seed), **self.settings(given or {}))


_tasks: dict[str, Task] = {}


def task(name: str, *, paper: str) -> Callable[[Callable[..., Drawn]], Callable[..., Drawn]]:
    """Register a task."""

    def register(function: Callable[..., Drawn]) -> Callable[..., Drawn]:
        _tasks[name] = Task(name, paper, function)
        return function

    return register


def task_named(name: str) -> Task:
    """The task of that name, or an error that lists the known ones."""
    if name not in _tasks:
        raise TransectError(f"unknown task {name!r}; known: {', '.join(sorted(_tasks))}")
    return _tasks[name]


def tasks() -> list[Task]:
    """All registered tasks, by name."""
    return [_tasks[name] for name in sorted(_tasks)]
