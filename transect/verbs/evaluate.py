"""`transect.evaluate`: loss, speed, size and memory of one model."""

from __future__ import annotations

from typing import Any

from .. import evaluation as evaluation_room
from ..data import SpecialTokens
from .common import held_out_of, opened_of


def evaluate(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a model on held-out data, its speed, and its size; see `evaluation.evaluate`.

    model: a Hugging Face model or the name of one. data, and what comes after the tokenizer: see `transect.data.load`.
    """
    opened = opened_of(model, tokenizer)
    held_out = held_out_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    return evaluation_room.evaluate(opened.model, held_out)
