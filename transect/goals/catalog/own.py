"""The model's own loss: of the next token, of masked tokens, or of the class of an example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ...checkpoint import Opened
from ...data import Batches, load
from ...evaluation import LossResult, evaluate_loss
from ...forward import Batch
from ...training import Machine, held_out_loss, own_loss
from ..goal import Goal, Reading
from ..registry import objective


@dataclass(frozen=True)
class Own(Goal):
    """opened: by which the data is read."""

    opened: Opened

    def read(self, data: Any, reading: Reading) -> Batches:
        opened = self.opened
        return load(data, opened.model, opened.tokenizer, opened.processor, **asdict(reading))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        return own_loss(model, batch)

    def measure(self, model: Any, batches: Iterable[Batch | None], machine: Machine) -> float:
        return held_out_loss(model, batches, machine)

    def evaluate(self, model: Any, batches: Iterable[Batch]) -> LossResult:
        return evaluate_loss(model, batches)


@objective("own", paper="the model's own")
def own(opened: Opened) -> Goal:
    """Cross-entropy of what the model's head predicts: the next token, masked tokens, or a class."""
    return Own(opened)
