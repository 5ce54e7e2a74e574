"""Attention whose scores are products of positive features: linear in the number of positions, with a state.

φ(q_t) Σ φ(k_s)ᵀ v_s / φ(q_t) Σ φ(k_s)ᵀ, over s <= t in a causal model. Linear transformers (Katharopoulos et al., ICML
2020) take φ = elu + 1; Performers (Choromanski et al., ICLR 2021) features whose products are the softmax's on average.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ...parameters import Seed
from ..attention import Attention
from ..part import Around
from ..precision import wide
from ..recurrence import decayed_recurrence

_LEAST = 1e-6  # of the denominator


class KernelAttention(Attention):
    """What all of them share; a subclass gives `features`."""

    cost = "N"
    recurrent = True

    def features(self, x: Tensor, of_keys: bool) -> Tensor:
        """φ of queries or keys (B x heads x N x size), positive, in float32 or wider."""
        raise NotImplementedError

    @property
    def features_of_a_head(self) -> int:
        """How many numbers φ gives."""
        return self.head_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        q, k = self.features(wide(q), of_keys=False), self.features(wide(k), of_keys=True)
        if around.real is not None:
            k = k * around.real[:, None, :, None]
        v = functional.pad(wide(v), (0, 1), value=1.0)  # the denominator is the sum of ones
        if self.causal:
            before = None if around.state is None else around.state.get("memory")
            y, memory = decayed_recurrence(q, k, v, None, before)
            if around.state is not None:
                around.state["memory"] = memory
        else:
            y = q @ (k.transpose(-1, -2) @ v)
        return y[..., :-1] / y[..., -1:].clamp_min(_LEAST)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * self.heads * self.features_of_a_head * (self.head_size + 1)


class Linear(KernelAttention):
    """φ(x) = elu(x) + 1: a matrix for each head is all that is remembered."""

    kind = "mixer.linear"
    paper = "arXiv:2006.16236"
    limit = "never softmax attention; its own quadratic form exactly"

    def __init__(self, width: int, heads: int, head_size: int, causal: bool) -> None:
        super().__init__(width, heads, head_size, causal)

    def features(self, x: Tensor, of_keys: bool) -> Tensor:
        return functional.elu(x) + 1


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
