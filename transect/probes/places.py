"""Where each token stands in its sequence, padding left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..forward import Seen


def places(seen: Seen, stream: Tensor) -> Tensor:
    """Number of each token in its sequence from 0, and -1 for padding (B x T). stream: any activation, B x T x d."""
    if seen.mask is None:
        return torch.arange(stream.shape[1], device=stream.device).expand(stream.shape[:2])
    return (seen.mask.long().cumsum(1) - 1).masked_fill(~seen.mask, -1)


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already: what sums and norms are taken in."""
    return x if x.dtype == torch.float64 else x.float()
