"""XᵀX at half the cost: only the blocks on and above the diagonal are computed."""

from __future__ import annotations

import torch
from torch import Tensor

# Small enough that little of the lower triangle is computed, large enough that each product runs at full speed.
_BLOCKS = 8
_SMALLEST_BLOCK = 128


def add_gram_(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of XᵀX, X (rows x n), to `total` (n x n) in place; the lower one stays meaningless.

    The products run in X's precision (float32 if X is narrower) and are added in `total`'s. With b blocks of columns
    the cost is (b + 1) / (2 b) of the full product: 56 % with 8.
    """
    n = x.shape[1]
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    step = max(_SMALLEST_BLOCK, -(-n // _BLOCKS))
    for start in range(0, n, step):
        left = x[:, start : start + step].T
        target = total[start : start + step, start:]
        if total.dtype == x.dtype:
            target.addmm_(left, x[:, start:])
        else:
            target += left @ x[:, start:]


def symmetric_from_upper(total: Tensor) -> Tensor:
    """The full symmetric matrix, from one whose upper triangle holds the numbers."""
    upper = total.triu()
    return upper + upper.triu(1).T
