"""What mixers with queries, keys and values by heads share, and softmax attention put together from pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .part import Around, Mixer
from .rotary import rotated

UNSEEN = -1e30  # score of a key that is not seen: its weight is 0, and a row of nothing else has no NaN in it


class Attention(Mixer):
    """Four matrices without bias and the model's rotary positions; a subclass says what its queries read."""

    roles = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(self, width: int, heads: int, head_size: int, causal: bool) -> None:
        super().__init__(causal)
        self.heads, self.head_size = heads, head_size
        inner = heads * head_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(inner, width, bias=False)

    def project(self, x: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B x heads x N x head size)."""
        q, k, v = (
            one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotated(q, around.rotary), rotated(k, around.rotary), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        """What the queries read of the values (B x heads x N x head size)."""
        raise NotImplementedError

    def mix(self, x: Tensor, around: Around) -> Tensor:
        y = self.attend(*self.project(x, around), around)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))


def wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is."""
    return x if x.dtype == torch.float64 else x.float()


def read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over a piece of the keys: what is read (... x Q x d) and log Σ exp of the scores (... x Q x 1).

    q: scaled. mask: which key a query sees (... x Q x K); a sum over none of them is as good as 0.
    """
    scores = wide(q @ k.mT).masked_fill(~mask, UNSEEN)
    return wide(scores.softmax(-1).to(v.dtype) @ v), scores.logsumexp(-1, keepdim=True)


def joined(pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmax over all keys (... x Q x d), from what `read` gives for disjoint pieces of them."""
    weights = torch.stack([sums for _, sums in pieces]).softmax(0)
    return (weights * torch.stack([y for y, _ in pieces])).sum(0)


def some_real(real: Tensor) -> Tensor:
    """Which positions are real (B x N); all of a sequence that has none, so that its softmax is over something."""
    return real | ~real.any(-1, keepdim=True)
