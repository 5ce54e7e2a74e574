"""What is summed and exponentiated is so in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is."""
    return x if x.dtype == torch.float64 else x.float()
