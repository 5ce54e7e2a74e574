"""AdamW."""

from __future__ import annotations

from typing import Annotated

import torch

from ...parameters import Range
from .registry import Groups, optimizer

Decay = Annotated[float, Range(0)]
Beta = Annotated[float, Range(0, 1, below=True)]


@optimizer("adamw", paper="arXiv:1711.05101")
def adamw(
    groups: Groups, lr: float, *, weight_decay: Decay = 0.0, beta1: Beta = 0.9, beta2: Beta = 0.999, eps: Decay = 1e-8
) -> torch.optim.Optimizer:
    """Steps of one size for every number, by running means of its gradient and of the gradient's square.

    weight_decay: share of a number that every step takes away, times the rate; 0 by default, since a repair or an
        adapter should not be pulled to zero (our choice).
    beta1: of the mean gradient.
    beta2: of the mean square.
    eps: below the root.
    """
    # Not fused: that kernel rounds by where a tensor lies, and a resumed training would not be the uninterrupted one.
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)  # type: ignore
