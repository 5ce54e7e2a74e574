"""Class scores of a text: the language model's logits of the label words at the blanks, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....data.loading import length_for
from ....data.tokenised import embedded
from ....errors import TransectError
from ....forward import Batch, logits_at, task_of, to_device
from .template import Template, padded
from .words import Given, Pool, Words, parsed_words, pooled


class Prompt:
    """Templates, label words and how both are pooled, for a masked or causal language model.

    It adds no number to the model. templates: a list, or one text with | between them. words: by class; the order of
    the classes is theirs.
    Raises TransectError for what does not go together, before any work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        templates: str | Sequence[str],
        words: str | Given,
        pool_words: Pool = "max",
        pool_templates: Pool = "mean",
    ) -> None:
        task = task_of(model)
        if task not in ("masked", "causal"):
            raise TransectError(
                f"a blank is filled by a masked or causal language model, and {type(model).__name__} is neither: load "
                "it with its language-model head (AutoModelForMaskedLM, AutoModelForCausalLM)"
            )
        if tokenizer is None:
            raise TransectError("templates and label words need the model's tokenizer: pass tokenizer=AutoTokenizer...")
        written = [part.strip() for part in templates.split("|")] if isinstance(templates, str) else list(templates)
        if not written:
            raise TransectError("one template or more is needed, such as '{text} It was {blank}'")
        self.templates = [Template(one, tokenizer, task == "causal") for one in written]
        self.words = Words.of(parsed_words(words) if isinstance(words, str) else words, self.templates)
        if int(self.words.ids.max()) >= embedded(model):
            raise TransectError(
                f"tokenizer and model disagree: a label word is none of the model's {embedded(model)} tokens"
            )
        self.pool_words: Pool = pool_words
        self.pool_templates: Pool = pool_templates
        self._length = lambda asked: length_for(asked, model, tokenizer)
        padding = tokenizer.pad_token_id
        self.padding = padding if padding is not None and padding < embedded(model) else 0  # it is masked out

    def encode(self, texts: Sequence[str], length: int | None = None, special: bool = True) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B x T x L) and `blank` (B x T) of B texts in T templates.

        length: tokens of a sequence at most; default what model and tokenizer allow.
        """
        most = self._length(length)
        rows = [[template.encode(text, most, special) for template in self.templates] for text in texts]
        return padded(rows, self.padding)

    def scores(self, model: Any, batch: Batch, which: Tensor | None = None) -> Tensor:
        """The pooled score of every class (B x C), with gradient. which: one template of each text (B); default all."""
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "blank")}
        ids = self.words.ids.expand(len(batch["blank"]), -1, -1)
        if which is not None:
            rows = torch.arange(len(which))
            batch = {name: tensor[rows, which.to(tensor.device)][:, None] for name, tensor in batch.items()}
            ids = ids[rows, which][:, None]
        blank = batch["blank"]
        flat = self.given(batch)
        where = torch.zeros_like(flat["input_ids"], dtype=torch.bool)
        where[torch.arange(len(where), device=where.device), blank.flatten()] = True
        logits = torch.cat(list(logits_at(model, to_device(flat, model.device), where)))
        words = logits.view(*blank.shape, -1).gather(2, ids.to(logits.device))
        return pooled(self.words.pooled(words, self.pool_words), self.pool_templates, 1)

    @staticmethod
    def given(batch: Batch) -> dict[str, Tensor]:
        """What the model's forward is given: a row for each text and template."""
        return {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
