"""`transect.evaluate`: loss, speed, size and memory of one model."""

from __future__ import annotations

from typing import Any

from .. import evaluation as evaluation_room
from ..arguments import checked
from ..data import SpecialTokens
from ..parameters import Seed
from .arguments import Count, Length
from .common import held_out_of, opened_of


@checked
def evaluate(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    batch_size: Count = 8,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a model on held-out data, its speed, and its size; see `evaluation.evaluate`.

    model: a Hugging Face model or the name of one. data, and what comes after the tokenizer: see `transect.data.load`.
    """
    opened = opened_of(model, tokenizer)
    held_out = held_out_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    return evaluation_room.evaluate(opened.model, held_out)
