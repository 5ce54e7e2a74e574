"""What an objective comes to for one kind of model: how the user's data is read, and what is made of a batch."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Batches, SpecialTokens
from ..errors import BadData, TransectError
from ..evaluation import LossResult
from ..forward import Batch, at_rest, computing_wide
from ..training import Machine


@dataclass(frozen=True)
class Reading:
    """How the user's data becomes batches; see `transect.data.load`, whose arguments these are."""

    sequence_length: int | None = None
    batch_size: int = 8
    sequences: int | None = None
    full_only: bool = False
    seed: int = 0
    special_tokens: SpecialTokens = "auto"


class Goal(ABC):
    """An objective with its settings, for a model and its tokenizer.

    It has no numbers of its own, and is told which model to run, so that a copy of the model, or the model with an
    adapter, is trained with the same goal.
    """

    @abstractmethod
    def read(self, data: Any, reading: Reading) -> Batches:
        """The user's data as batches; TransectError for what it cannot be made of."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """What training lowers: summed over the batch, with gradient, and how many terms that is."""

    @abstractmethod
    def measure(self, model: Any, batches: Iterable[Batch | None], machine: Machine) -> float:
        """The held-out loss: the mean term over all processes' shares. NaN or infinite if the model puts that out."""

    @abstractmethod
    def evaluate(self, model: Any, batches: Iterable[Batch]) -> LossResult:
        """Loss and score, example by example. TransectError where the loss is not finite."""

    def given(self, batch: Batch) -> Batch:
        """What the model's forward is given of a batch: one row a sequence. Penalties look at it."""
        return batch


class ExampleGoal(Goal):
    """A goal with one loss an example (a text with its class, a pair of answers), and right or wrong."""

    @abstractmethod
    def losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each example its loss (B), in nats, with gradient, and whether the model is right about it (B)."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        losses, _ = self.losses(model, batch)
        return losses.sum(), len(losses)

    @torch.no_grad()
    def measure(self, model: Any, batches: Iterable[Batch | None], machine: Machine) -> float:
        summed = torch.zeros(2, dtype=torch.float64)
        with at_rest(model):
            for batch in batches:
                if batch is not None:
                    losses, _ = self.losses(model, batch)
                    summed += torch.tensor([losses.double().sum().item(), len(losses)], dtype=torch.float64)
        loss, count = machine.total(summed).tolist()
        return loss / count if count else math.nan

    @torch.no_grad()
    def evaluate(self, model: Any, batches: Iterable[Batch]) -> LossResult:
        started, nats, right = time.perf_counter(), [], 0
        with at_rest(model), computing_wide(model):
            for batch in batches:
                losses, correct = self.losses(model, batch)
                nats += losses.double().tolist()
                right += int(correct.sum())
        if not nats:
            raise BadData("the batches hold no example")
        loss = sum(nats) / len(nats)
        if not math.isfinite(loss):
            raise TransectError("the loss is not finite: the model puts out NaN or infinity")
        seconds, perplexity = time.perf_counter() - started, math.exp(loss) if loss < 700 else math.inf
        return LossResult(loss, perplexity, len(nats), right / len(nats), seconds, tuple((each, 1) for each in nats))
