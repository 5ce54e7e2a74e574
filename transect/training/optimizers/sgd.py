"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Annotated

import torch

from ...parameters import Range
from .adamw import Decay
from .registry import Groups, optimizer


@optimizer("sgd", paper="Polyak 1964, doi:10.1016/0041-5553(64)90137-5")
def sgd(
    groups: Groups, lr: float, *, momentum: Annotated[float, Range(0, 1, below=True)] = 0.9, weight_decay: Decay = 0.0
) -> torch.optim.Optimizer:
    """Steps along a running sum of the gradients.

    momentum: share of the sum that stays at every step; 0 for the gradient alone.
    weight_decay: times the number itself, added to its gradient (so it is part of the sum, unlike AdamW's).
    """
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)  # type: ignore
