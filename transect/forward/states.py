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
def with_states_of(model: Any, batches: Iterable[Batch]) -> list[Batch]:
    """The batches with the model's last hidden states in them (`labels`, B x T x d, float32, on the CPU).

    Those that have labels, and all batches of a model with a head, come back as they are.
    """
    if task_of(model) != "embedding":
        return list(batches)
    with at_rest(model), computing_wide(model):
        return [batch if "labels" in batch else {**batch, "labels": _states(model, batch)} for batch in batches]


def _states(model: Any, batch: Batch) -> Tensor:
    return outputs_of(model, inputs_of(model, batch)).float().cpu()
