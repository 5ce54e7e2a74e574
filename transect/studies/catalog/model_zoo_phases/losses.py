"""What is measured with: any loss of any torch module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import TransectError
from ....forward import at_rest

# Of a model and a batch: the summed loss (a scalar) and how many terms it has, as `transect.training.own_loss` for
# models of transformers. It takes the batch to the model's device.
Loss = Callable[[Any, Any], tuple[Tensor, float]]


@torch.no_grad()
def mean_loss(model: Any, loss: Loss, batches: Sequence[Any]) -> float:
    """The mean over all terms of all batches, in evaluation mode. TransectError where there are none."""
    summed = count = 0.0
    with at_rest(model):
        for batch in batches:
            total, terms = loss(model, batch)
            summed, count = summed + float(total), count + terms
    if not count:
        raise TransectError("the batches hold nothing to measure a loss on: give some that do")
    return summed / count
