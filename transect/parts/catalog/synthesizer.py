"""Synthesizers (Tay et al., ICML 2021, arXiv:2005.00743): attention weights that no pair of positions decides together.

Both are softmax attention with trained vectors for the positions instead of keys, and so are computed as such: no
N x N matrix is stored.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..attention import seen_by
from ..part import Around, Mixer


class Synthesizer(Mixer):
    """What both share; a subclass gives the vectors whose products are the scores."""

    cost = "N²"

    def __init__(self, width: int, heads: int, head_size: int, length: int, causal: bool) -> None:
        super().__init__(causal)
        if length < 1:
            raise TransectError(
                f"{self.kind} needs a fixed number of positions, which this model's config does not give"
            )
        self.heads, self.head_size, self.length = heads, head_size, length
        self.v_proj = nn.Linear(width, heads * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def vectors(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of which the products are the scores (1 or B x heads x N x r), of positions (1 or B x N)."""
        raise NotImplementedError

    def mix(self, x: Tensor, around: Around) -> Tensor:
        count, real = x.shape[1], around.real
        if count > self.length:
            raise TransectError(f"{self.kind} knows {self.length} positions, and there are {count}")
        number = torch.arange(count, device=x.device)[None] if real is None else (real.cumsum(1) - 1).clamp(min=0)
        q, k = (one.expand(len(x), -1, -1, -1) for one in self.vectors(x, number))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = seen_by(count, count, self.causal, real, x.device)
        causal = mask is None and self.causal
        size = max(self.size, self.head_size)  # of all three alike, or torch would store all scores
        q, k, v = (functional.pad(one, (0, size - one.shape[-1])) for one in (q, k.to(q.dtype), v))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0)
        return self.o_proj(y[..., : self.head_size].transpose(1, 2).flatten(2))

    def mixing_flops(self, length: int) -> int:
        return 2 * length * length * self.heads * (self.head_size + self.size)

    @property
    def size(self) -> int:
        """Numbers of each vector."""
        return self.head_size


class DenseSynthesizer(Synthesizer):
    """softmax(relu(x W₁ + b) W₂) v by heads (equation 2): each position decides by itself how it weighs all places.

    W₁ is as wide as the heads. A model knows a fixed number of places.
    """

    kind = "mixer.dense-synthesizer"
    paper = "arXiv:2005.00743"
    limit = "never softmax attention: what stands at a place does not enter its weight"
    roles = {"q": "q_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(self, width: int, heads: int, head_size: int, length: int, causal: bool) -> None:
        super().__init__(width, heads, head_size, length, causal)
        self.q_proj = nn.Linear(width, heads * head_size)
        self.places = nn.Parameter(torch.randn(heads, length, head_size) * head_size**-0.5)

    def vectors(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        q = functional.relu(self.q_proj(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return q, self.places[:, number].transpose(0, 1)


class RandomSynthesizer(Synthesizer):
    """softmax(R₁ R₂ᵀ) v by heads (equation 7): which places a place reads is trained, and the same for all inputs.

    rank: columns of R₁ and R₂.
    """

    kind = "mixer.random-synthesizer"
    paper = "arXiv:2005.00743"
    limit = "never softmax attention: weights do not depend on the input"
    roles = {"v": "v_proj", "o": "o_proj"}

    def __init__(
        self, width: int, heads: int, head_size: int, length: int, causal: bool, *,
        rank: Annotated[int, Range(1, 2**16)] = 8,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, length, causal)
        self.reading, self.read = (nn.Parameter(torch.randn(heads, length, rank) * rank**-0.25) for _ in range(2))

    @property
    def size(self) -> int:
        return self.read.shape[-1]

    def vectors(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (one[:, number].transpose(0, 1) for one in (self.reading, self.read))
        return q.to(x.dtype), k
