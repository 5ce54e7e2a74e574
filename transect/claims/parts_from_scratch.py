"""Small models with parts in their slots, trained from scratch inside a claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..parts import build_model
from .context import Context
from .descent import descend
from .scratch import cut, fresh_rows

SIZES: dict[str, Any] = {"hidden": 64, "blocks": 2, "heads": 4}
LENGTH, BATCH, RATE = 64, 8, 2e-3


def trained_from_scratch(
    context: Context, steps: int, seed: int, parts: Mapping[str, str] | None = None, *,
    settings: Mapping[str, Mapping[str, Any]] | None = None, neurons: int = 128, rate: float = RATE,
) -> Any:  # fmt: skip
    """A Llama of width 64 and two blocks, trained to predict the next token; the same data and order for every part."""
    context.require_language_model()
    longest = max(map(len, context.evaluation.texts()))
    rows = cut(fresh_rows(context, steps * BATCH * LENGTH)[0], min(LENGTH, longest), steps * BATCH)
    vocabulary = context.anatomy.config.vocab_size
    model = build_model(
        "llama", parts=parts, settings=settings, seed=seed, neurons=neurons, vocabulary=vocabulary, length=longest + 1,
        **SIZES,
    ).to(context.model.device)  # fmt: skip
    order = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(rows), (BATCH,), generator=order).tolist()
        ids = torch.stack([rows[index] for index in chosen]).to(model.device)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    descend(model, loss, steps, rate)
    return model
