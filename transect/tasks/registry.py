"""A task is a function whose signature is its configuration: it draws examples.

`@task(name, ...)` registers `function(count, generator, **settings) -> Drawn`. Seeds of the generator that are even are
for training, odd ones are held out.
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
    """Examples. inputs: ids (count x T), images (count x C x H x W), or vectors (count x T x n).

    vocabulary: how many ids there are, or classes; 1 where the answers are numbers. answers: of ids, the positions
    (count x T, true where) whose id the positions before have to give; of images, the class of each (count); of
    vectors, what the positions before each have to give (count x T), a class (IGNORED where nothing is asked) or a
    number (NaN there). over: what the answers are also looked at by, such as how many keys a sequence has (count x T).
    """

    inputs: Tensor
    answers: Tensor
    vocabulary: int
    over: Tensor | None = None

    @property
    def images(self) -> bool:
        """Whether the inputs are images."""
        return self.inputs.dim() == 4

    @property
    def vectors(self) -> int:
        """How wide the inputs are, if they are vectors; else 0."""
        return self.inputs.shape[2] if self.inputs.dim() == 3 else 0

    @property
    def numeric(self) -> bool:
        """Whether the answers are numbers, of which the squared error counts."""
        return self.answers.is_floating_point()

    @property
    def asked(self) -> Tensor:
        """Where an answer is asked for (count x T); of images (count)."""
        if self.numeric:
            return ~self.answers.isnan()
        return self.answers if self.answers.dtype == torch.bool else self.answers != IGNORED

    def batches(self, size: int) -> Batches:
        """The same, `size` examples at a time, as a model's forward and the loss take them."""
        if self.images:
            rows = {"pixel_values": self.inputs, "labels": self.answers}
        elif self.vectors:
            rows = {"inputs_embeds": self.inputs, "labels": self.answers}
        else:
            rows = {"input_ids": self.inputs, "labels": self.inputs.masked_fill(~self.answers, IGNORED)}
        starts = range(0, len(self.inputs), size)
        return Batches([{name: tensor[start : start + size] for name, tensor in rows.items()} for start in starts])


@dataclass(frozen=True)
class Task(Entry):
    """A registered task.

    over: what `Drawn.over` counts, in words. baselines: (examples, **settings) -> what others than models make of
    them: by name the score of every answer (count x T), 1 where it is right and 0 where not, or its squared error.
    asks: (model, **settings) -> further scores of a trained model by name, from 0 to 1.
    source: (**settings) -> the text of what the examples are made from, where the settings do not say it all.
    """

    over: str = ""
    baselines: Callable[..., Mapping[str, Tensor]] | None = None
    asks: Callable[..., Mapping[str, float]] | None = None
    source: Callable[..., str] | None = None
    family: ClassVar[str] = "task"

    def draw(self, count: int, seed: int, given: Mapping[str, Any] | None = None) -> Drawn:
        """`count` examples; other seeds give others."""
        if count < 1:
            raise TransectError(f"{self.name}: at least one example is to be drawn, not {count}")
        return self.function(count, torch.Generator().manual_seed(seed), **self.settings(given or {}))


_tasks: dict[str, Task] = {}


def task(name: str, *, paper: str, **more: Any) -> Callable[[Callable[..., Drawn]], Callable[..., Drawn]]:
    """Register a task. more: see `Task`."""

    def register(function: Callable[..., Drawn]) -> Callable[..., Drawn]:
        _tasks[name] = Task(name, paper, function, **more)
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
