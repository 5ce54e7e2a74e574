"""Substitutes of a word without any table: its nearest neighbours among the model's own input embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import TransectError


class Neighbours:
    """Of a word that is one token, the other such words whose embeddings point the most nearly its way.

    model, tokenizer: whose embeddings and words these are. most: so many at most. least: cosine of those that count.
    Nearness of embeddings is not sameness of meaning: opposites are near each other, too.
    """

    def __init__(self, model: Any, tokenizer: Any, most: int = 8, least: float = 0.5) -> None:
        rows: Tensor = model.get_input_embeddings().weight.detach().float()
        special = set(tokenizer.all_special_ids)
        ids = [i for i in range(min(len(rows), len(tokenizer))) if i not in special]
        words = [tokenizer.decode([i]).strip() for i in ids]
        kept = [(i, word) for i, word in zip(ids, words, strict=True) if word.isalpha()]
        if not kept:
            raise TransectError(f"none of {type(tokenizer).__name__}'s tokens is a word")
        written = [f" {word}" for _, word in kept]  # as they stand behind another word
        again = tokenizer(written, add_special_tokens=False)["input_ids"]
        found = [(i, word) for (i, word), back in zip(kept, again, strict=True) if list(back) == [i]]
        self.most, self.least = most, least
        self.places = {word: place for place, (_, word) in enumerate(found)}
        self.words = [word for _, word in found]
        self.units = torch.nn.functional.normalize(rows[torch.tensor([i for i, _ in found], dtype=torch.long)], dim=-1)

    def __call__(self, word: str) -> list[str]:
        place = self.places.get(word)
        if place is None:
            return []
        near = self.units @ self.units[place]
        near[place] = -torch.inf
        values, others = near.topk(min(self.most, len(near) - 1))
        return [self.words[i] for i, value in zip(others.tolist(), values.tolist(), strict=True) if value >= self.least]
