"""What a training of the whole model lowers: its own loss, or its distance from the dense model's predictions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..forward import Batch, at_rest, predictions, scored, summed_loss
from .machine import Machine


def own_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed over the predictions that the batch asks for, and their number."""
    logits, labels = predictions(model, batch)
    return summed_loss(logits, labels), len(labels)


def distance_from(teacher: Any, model: Any, batch: Batch, temperature: float) -> tuple[Tensor, int]:
    """T² KL(p_teacher || p_model) in nats, summed over the predictions, with logits divided by T (Hinton et al. 2015).

    The factor keeps the size of the gradient when T changes.
    """
    with torch.no_grad():
        target, _ = predictions(teacher, batch)
    logits, labels = predictions(model, batch)
    if labels.is_floating_point():  # hidden states
        return summed_loss(logits, target), len(labels)
    ours = functional.log_softmax(logits.float() / temperature, dim=-1)
    theirs = functional.log_softmax(target.float() / temperature, dim=-1)
    divergence = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * divergence, labels.numel()


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Batch | None], machine: Machine) -> float:
    """Mean loss of a prediction in nats, over all processes' shares; NaN or infinite if the model puts that out."""
    summed = torch.zeros(2, dtype=torch.float64)
    with at_rest(model):
        for batch in batches:
            for logits, labels, _ in () if batch is None else scored(model, batch):
                summed += torch.tensor([summed_loss(logits, labels).item(), len(labels)], dtype=torch.float64)
    loss, count = machine.total(summed).tolist()
    return loss / count if count else float("nan")
