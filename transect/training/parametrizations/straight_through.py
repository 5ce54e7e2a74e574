"""One matrix in the forward pass, and in the backward pass another's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trained: Tensor, used: Tensor, mask: Tensor | None) -> Tensor:  # pyright: ignore
        if mask is not None:
            ctx.save_for_backward(mask)
        return used.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        masks = ctx.saved_tensors
        return gradient * masks[0] if masks else gradient, None, None


def straight_through(trained: Tensor, used: Tensor, mask: Tensor | None = None) -> Tensor:
    """`used`, bit for bit; `trained` gets the gradient as if it were that, but for 0 where a mask is False."""
    made: Any = _StraightThrough.apply(trained, used.detach(), mask)
    return made
