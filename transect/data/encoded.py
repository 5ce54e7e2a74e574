"""Texts of different lengths as batches: token ids padded on the right, with their mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, TransectError
from .preferences import Preference
from .tokenised import embedded


def encoded(texts: Sequence[str], tokenizer: Any, model: Any, length: int) -> list[Tensor]:
    """Token ids of each text, with what the tokenizer puts around it; of a longer one the last `length` are kept.

    Raises BadData for a text without tokens, and if the model has no row for a token.
    """
    if tokenizer is None:
        raise TransectError("texts need a tokenizer, and the model came without one: pass tokenizer=")
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"  # the end is what is judged
    try:
        rows = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    if not all(rows):
        raise BadData(f"a text has no tokens: {texts[[bool(row) for row in rows].index(False)][:40]!r}")
    if (largest := max((max(row) for row in rows), default=0)) >= embedded(model):
        raise BadData(
            f"tokenizer and model disagree: there is a token {largest}, but the model's embedding has "
            f"{embedded(model)} rows"
        )
    return [torch.tensor(row) for row in rows]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B x T) of token ids."""
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def pair_batches(
    preferences: Sequence[Preference], tokenizer: Any, model: Any, length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """`input_ids` and `attention_mask` (B x 2 x T; of a pair the better answer first), and the pairs' `weight` (B)."""
    texts = [pair.prompt + answer for pair in preferences for answer in (pair.better, pair.worse)]
    rows = encoded(texts, tokenizer, model, length)
    batches = []
    for start in range(0, len(preferences), batch_size):
        part = preferences[start : start + batch_size]
        batch = padded(rows[2 * start : 2 * (start + len(part))])
        pairs = {name: tensor.unflatten(0, (-1, 2)) for name, tensor in batch.items()}
        batches.append({**pairs, "weight": torch.tensor([pair.weight for pair in part])})
    return batches


def prompt_batches(
    prompts: Sequence[str], labels: Sequence[int], tokenizer: Any, model: Any, length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """`input_ids` and `attention_mask` (B x T) of prompts, and the numbers of their categories, `labels` (B)."""
    rows = encoded(prompts, tokenizer, model, length)
    return [
        {**padded(rows[start : start + batch_size]), "labels": torch.tensor(labels[start : start + batch_size])}
        for start in range(0, len(prompts), batch_size)
    ]
