"""Training small models inside a claim."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..statistics import Progress


def descend(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    weight_decay: float = 0.1,
    progress: Progress | None = None,
) -> None:
    """Train every parameter with AdamW; the module is in eval mode afterwards.

    loss: step -> scalar. rate: the highest, after a linear warm-up over a tenth of the steps; then a cosine to
    zero. Gradients are clipped to length 1.
    """
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=weight_decay)
    for step in progress(range(steps), "training") if progress else range(steps):
        warm = min(1.0, (step + 1) / (steps / 10))
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    module.eval()
