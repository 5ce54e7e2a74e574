"""What claims about routed blocks share: how long a text's beginning is, training, the loss behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..anatomy import Anatomy
from ..conversion import Plan, convert_anatomy
from ..conversion.routed import loss_behind
from ..errors import NotApplicable
from ..forward import at_rest
from .context import Context, Measured

LARGEST = 10_000_000  # numbers of a model that a claim trains
MOST = 24  # positions of a beginning


def beginning(context: Context) -> int:
    """How many first positions are routed, or decide: half of the shortest sequence, at most 24."""
    context.require_language_model()
    context.specimen.require_causal()
    shortest = min(len(text) for batches in (context.calibration, context.evaluation) for text in batches.texts())
    if shortest < 4:
        raise NotApplicable("a sequence of fewer than four tokens has no beginning")
    return min(MOST, shortest // 2)


def require_trainable(context: Context) -> None:
    """Not applicable to a model that is too large to be trained here."""
    numbers = sum(parameter.numel() for parameter in context.model.parameters())
    if numbers > LARGEST:
        raise NotApplicable(f"it trains the model, which has {numbers:,} numbers: above {LARGEST:,}")


def converted(context: Context, method: str, settings: Mapping[str, Any], steps: int = 0, **options: Any) -> Any:
    """A copy of the model, converted and trained for so many steps on the calibration text."""
    plan = Plan(method, settings, steps=steps, **options)
    return convert_anatomy(Anatomy(context.fresh().model), plan, context.calibration)[0].eval()


@torch.no_grad()
def loss_of(context: Context, model: Any, positions: int) -> Measured:
    """The loss behind the first positions, sequence by sequence."""
    loss, nats, predictions = loss_behind(positions), [], []
    with at_rest(model):
        for batch in context.evaluation:
            for row in range(len(batch["input_ids"])):
                summed, count = loss(model, None, {name: tensor[row : row + 1] for name, tensor in batch.items()})
                nats.append(float(summed))
                predictions.append(count)
    return Measured(torch.tensor(nats, dtype=torch.float64), torch.tensor(predictions, dtype=torch.float64), 1.0)
