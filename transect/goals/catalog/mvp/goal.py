"""Training a prompt: cross-entropy over the classes' pooled scores, and, if asked for, on perturbed embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....data import Batches, load_rows
from ....data.text import documents
from ....errors import BadData
from ....evaluation.attacks import added, perturbation
from ....forward import Batch
from ....forward.objective import losses_of
from ...goal import ExampleGoal, Reading
from .prompt import Prompt


@dataclass(frozen=True)
class PromptGoal(ExampleGoal):
    """See `mvp` for the fields."""

    prompt: Prompt
    train_on: Literal["all", "one"] = "all"
    epsilon: float = 0.0
    attack_steps: int = 1

    def read(self, data: Any, reading: Reading) -> Batches:
        rows = load_rows(data, reading.sequences)
        texts, labels = list(documents(rows)), torch.tensor([self.label(row) for row in rows])
        length, special = reading.sequence_length, reading.special_tokens == "auto"
        parts = [slice(start, start + reading.batch_size) for start in range(0, len(rows), reading.batch_size)]
        return Batches([{**self.prompt.encode(texts[part], length, special), "labels": labels[part]} for part in parts])

    def losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._judged(self.prompt.scores(model, batch), batch)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        count, templates = batch["blank"].shape
        which = torch.randint(templates, (count,)) if self.train_on == "one" else None

        def summed() -> Tensor:
            return self._judged(self.prompt.scores(model, batch, which), batch)[0].sum()

        if not self.epsilon:
            return summed(), count
        real = batch["attention_mask"]
        real = real.flatten(0, 1) if which is None else real[torch.arange(count), which]
        delta = perturbation(model, summed, real, epsilon=self.epsilon, steps=self.attack_steps)
        with added(model.get_input_embeddings(), delta):
            return summed(), count

    def given(self, batch: Batch) -> Batch:
        return self.prompt.given(batch)

    @staticmethod
    def _judged(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch["labels"].to(scores.device)
        return losses_of(scores, labels), scores.argmax(-1) == labels

    def label(self, row: Any) -> int:
        """The class of an example."""
        label = row.get("label", row.get("labels"))
        if label is None:
            raise BadData(f"examples need a column `label`; the columns are {', '.join(map(repr, row))}")
        return self.prompt.words.number(label)
