"""Performers (Choromanski et al., ICLR 2021, arXiv:2009.14794): features whose products are softmax's on average."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...arguments import Range
from ...parameters import Seed
from ..kernels import KernelAttention


class Performer(KernelAttention):
    """Random positive features (FAVOR+), orthogonal in blocks: their products are exp(q k / sqrt(size)) on average.

    features: how many for each head; the more, the nearer to softmax.
    seed: of the directions, which are not trained.
    """

    kind = "mixer.performer"
    paper = "arXiv:2009.14794"
    limit = "with ever more features it is softmax attention"
    directions: Tensor

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *,
        features: Annotated[int, Range(1, 2**16)] = 64, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        drawn = torch.empty(features, head_size)
        if drawn.device.type != "meta":
            drawn.copy_(orthogonal_directions(features, head_size, seed))
        self.register_buffer("directions", drawn)

    @property
    def features_of_a_head(self) -> int:
        return len(self.directions)

    def features(self, x: Tensor, of_keys: bool) -> Tensor:
        return positive_features(x, self.directions.to(x.dtype), of_keys)


def orthogonal_directions(count: int, size: int, seed: int) -> Tensor:
    """Rows of N(0, I), orthogonal to one another in blocks of `size` (count x size)."""
    draw, blocks = torch.Generator().manual_seed(seed), -(-count // size)
    with torch.device("cpu"):
        square, other = (torch.randn(blocks, size, size, generator=draw, dtype=torch.float64) for _ in range(2))
        turned, upper = torch.linalg.qr(square)
        turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # only so are their directions uniform
        return (turned.mT * other.norm(dim=-1, keepdim=True)).flatten(0, 1)[:count].float()


def positive_features(x: Tensor, directions: Tensor, of_keys: bool) -> Tensor:
    """exp(w x' - |x'|² / 2) / sqrt(m) with x' = x / size^(1/4), for m directions w (m x size).

    Of queries, the largest exponent of each is taken off, which its quotient does not see. Keys must agree, also with
    those of later calls, so that nothing is taken off theirs: their exponent is at most |w|² / 2.
    """
    scaled = x * x.shape[-1] ** -0.25
    exponents = scaled @ directions.T - scaled.square().sum(-1, keepdim=True) / 2
    if not of_keys:
        exponents = exponents - exponents.amax(-1, keepdim=True).detach()
    return exponents.exp() * len(directions) ** -0.5
