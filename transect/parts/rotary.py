"""The model's own rotary positions, for mixers that have queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys x (B x heads x N x head size), turned by their positions; as they are without any.

    rotary: cos and sin (1 or B x N x r) of which channels i and i + r/2 get the same; the channels from r on are not
    turned.
    """
    if rotary is None:
        return x
    cos, sin = (angles.unsqueeze(1).to(x.dtype) for angles in rotary)
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([rotated(turned, rotary), rest], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
