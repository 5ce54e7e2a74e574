"""What other forms of a model without a head should put out: its own last hidden states, in the batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .mode import at_rest
from .objective import Batch, inputs_of, outputs_of, task_of
from .wide import computing_wide


@torch.no_grad()
def with_states_of(model: Any, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """The batches with the model's last hidden states in them (`labels`, B x T x d, float32, on the CPU).

    Those that have labels, and all batches of a model with a head, come back with the same tensors.
    """
    if task_of(model) != "embedding":
        return [dict(batch) for batch in batches]
    with at_rest(model), computing_wide(model):
        return [_with_states(model, batch) for batch in batches]


def _with_states(model: Any, batch: Batch) -> dict[str, Tensor]:
    if "labels" in batch:
        return dict(batch)
    return {**batch, "labels": outputs_of(model, inputs_of(model, batch)).float().cpu()}
