"""How weights are drawn from logits: Gumbel-softmax while training, the largest one afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Sample = Callable[[Tensor], Tensor]  # logits over the last dimension -> weights of the same shape, which sum to 1


def gumbel(temperature: float) -> Sample:
    """softmax((logits + g) / τ) with fresh Gumbel noise g; the largest weight is at i with chance softmax(logits)_i.

    Jang et al. 2017; the paper's Section 3.1. It becomes one-hot as τ goes to 0.
    """

    def sample(logits: Tensor) -> Tensor:
        # Many choices among few: over the first dimension of two a softmax takes a tenth of the time, and this noise a
        # quarter of torch's.
        chances = torch.rand_like(logits).clamp_min_(torch.finfo(logits.dtype).tiny)
        noisy = (logits - chances.log_().neg_().log_()) / temperature
        return noisy.flatten(0, -2).T.softmax(0).T.unflatten(0, noisy.shape[:-1])

    return sample


def largest(logits: Tensor) -> Tensor:
    """One-hot at the largest, of equals at the first."""
    return functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)


def temperature(step: int, per_epoch: int, epochs: int, hot: float, cold: float) -> float:
    """From `hot` to `cold` in equal factors; an epoch begins where the one before ends, and the last is all cold."""
    epoch, within = divmod(step, per_epoch)
    gone = epoch + within / max(1, per_epoch - 1)
    return hot * (cold / hot) ** min(1.0, gone / max(1, epochs - 1))
