"""Which singular values of a weight are trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Select = Literal["leading", "smallest", "random"]
TIE = 1e-12  # of the largest value: what neighbours differ by whose vectors are the decomposition's free choice


def decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out x q), s (q) falling, and Vᵀ (q x d_in) of W = U diag(s) Vᵀ, q = min(d_out, d_in); float64.

    In float64 whatever the weight's type, so that another machine finds the same vectors. Those of close values are
    mixed by rounding, by about its size over their relative distance: in float32 that is far more than rounding.
    """
    return torch.linalg.svd(weight.double(), full_matrices=False)


def enough(values: Tensor, energy: float) -> int:
    """The smallest r for which the first r of falling values (q) carry this share of the sum of all squares.

    That "information" is this sum is our reading; the paper's own definition could not be found.
    """
    carried = values.square().cumsum(0)
    return min(int((carried < energy * carried[-1]).sum()) + 1, len(values))


def chosen(count: int, among: int, select: Select, seed: int) -> Tensor:
    """Places, ascending, of so many values among all that are sorted downwards."""
    if select == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(among, generator=generator)[:count].sort().values
    start = among - count if select == "smallest" else 0
    return torch.arange(start, start + count)


def tied(values: Tensor, places: Tensor) -> int:
    """How many of the values at these places are equal to a neighbour, and so have no vectors of their own."""
    close = values[:-1] - values[1:] <= TIE * values[0]
    no = close.new_zeros(1)
    return int((torch.cat([close, no]) | torch.cat([no, close]))[places].sum())
