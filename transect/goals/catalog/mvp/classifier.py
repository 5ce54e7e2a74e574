"""A language model as a classifier, before any training and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....data import load_rows
from ....data.text import documents
from ....evaluation import LossResult
from ....evaluation.attacks import Robustness, gradient_attack, substitution_attack
from ....evaluation.attacks.substitution import Substitutes
from ....forward import at_rest, computing_wide
from ...goal import Reading
from .goal import PromptGoal
from .prompt import Prompt
from .words import Given, Pool

_TOGETHER = 32  # texts in a pass


class PromptClassifier:
    """Class scores from the words that the model would put into a blank.

        classifier = PromptClassifier(model, tokenizer, "{text} It was {blank} .", {"no": ["bad"], "yes": ["good"]})
        classifier.predict(["What a film !"])

    model: a masked or causal language model, or a PEFT model of one; it is not changed. templates, words, pools: see
    the objective `mvp`; a list of templates and a dict of lists of words may be given, too.
    sequence_length: tokens at most; the text is cut off, never the template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        templates: str | Sequence[str],
        words: str | Given,
        *,
        pool_words: Pool = "max",
        pool_templates: Pool = "mean",
        sequence_length: int | None = None,
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.goal = PromptGoal(Prompt(self.model, tokenizer, templates, words, pool_words, pool_templates))
        self.reading = Reading(sequence_length, _TOGETHER)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the scores."""
        return self.goal.prompt.words.classes

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """The pooled score of every class (n x C)."""
        prompt, length, found = self.goal.prompt, self.reading.sequence_length, []
        with at_rest(self.model), computing_wide(self.model):
            for start in range(0, len(texts), _TOGETHER):
                found.append(prompt.scores(self.model, prompt.encode(texts[start : start + _TOGETHER], length)).cpu())
        return torch.cat(found) if found else torch.zeros(0, len(self.classes))

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The name of each text's class."""
        return [self.classes[number] for number in self.scores(texts).argmax(-1).tolist()]

    def evaluate(self, data: Any) -> LossResult:
        """Cross-entropy over the classes, and accuracy. data: rows of texts and labels."""
        return self.goal.evaluate(self.model, self.goal.read(data, self.reading))

    def exchange_words(self, data: Any, substitutes: Substitutes, most: float = 0.1) -> Robustness:
        """Accuracy before and under the substitution of words in the texts; see `substitution_attack`."""
        rows = load_rows(data)
        labels = [self.goal.label(row) for row in rows]
        return substitution_attack(self.scores, list(documents(rows)), labels, substitutes, most=most)

    def move_embeddings(self, data: Any, epsilon: float = 1.0, steps: int = 10, seed: int = 0) -> Robustness:
        """Accuracy before and under steps along the gradient of the embeddings; see `gradient_attack`."""
        model, goal = self.model, self.goal
        return gradient_attack(
            model, lambda batch: goal.losses(model, batch), lambda batch: goal.given(batch)["attention_mask"],
            goal.read(data, self.reading), epsilon=epsilon, steps=steps, seed=seed,
        )  # fmt: skip
