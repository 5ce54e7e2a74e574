"""Whether numbers are finite, in one pass over them."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    A sum is finite only if all numbers are, and takes a tenth of the time of looking at each, which is done only where
    it is not: finite numbers may be too large for their sum.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
