"""What mixers with queries, keys and values by heads share, and softmax attention put together from pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .part import Around, Mixer
from .precision import wide
from .rotary import rotated

UNSEEN = -1e30  # score of a key that is not seen: its weight is 0, and a row of nothing else has no NaN in it


class Attention(Mixer):
    """Four matrices and the model's rotary positions; a subclass says what its queries read.

    key_value_heads: heads of keys and values, each for as many of the queries; default as many as there are. bias: of
    the matrices.
    """

    roles = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, key_value_heads: int | None = None,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        self.heads, self.key_value_heads, self.head_size = heads, key_value_heads or heads, head_size
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, count * head_size, bias=bias) for count in (heads, *[self.key_value_heads] * 2)
        )
        self.o_proj = nn.Linear(heads * head_size, width, bias=bias)

    def by_heads(self, y: Tensor) -> Tensor:
        """What a matrix makes of the input (B x N x heads * size), by heads (B x heads x N x size)."""
        return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def project(self, x: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
        """q (B x heads x N x head size), k and v (of the heads that these have)."""
        q, k, v = (self.by_heads(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        return rotated(q, around.rotary), rotated(k, around.rotary), v

    def for_queries(self, *kept: Tensor) -> Iterator[Tensor]:
        """Keys or values, each head's as often as there are heads of queries that read it."""
        times = self.heads // self.key_value_heads
        return (one if times == 1 else one.repeat_interleave(times, dim=1) for one in kept)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        """What the queries read of the values (B x heads x N x head size)."""
        raise NotImplementedError

    def mix(self, x: Tensor, around: Around) -> Tensor:
        return self.put_out(self.attend(*self.project(x, around), around), x)

    def put_out(self, y: Tensor, x: Tensor) -> Tensor:
        """The output (B x N x d, in the type of x) of what was read by heads."""
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))


def with_past(
    k: Tensor, v: Tensor, real: Tensor | None, state: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values so far, with which of them are real (None: all); kept with the positions in dimension 2."""
    if real is not None or "real" in state:
        shape, before = (k.shape[0], k.shape[2]), state["k"].shape[2] if "k" in state else 0
        past = state["real"] if "real" in state else k.new_ones(k.shape[0], before, dtype=torch.bool)
        state["real"] = torch.cat([past, k.new_ones(shape, dtype=torch.bool) if real is None else real], dim=1)
    for name, tensor in (("k", k), ("v", v)):
        state[name] = torch.cat([state[name], tensor], dim=2) if name in state else tensor
    return state["k"], state["v"], state.get("real")


def seen_by(queries: int, keys: int, causal: bool, real: Tensor | None, device: torch.device) -> Tensor | None:
    """Which key each query may see (1 or B x 1 x queries x keys), the queries being the last positions.

    None where that is every key, or, if causal and there are as many of both, every one up to its own. A query at
    padding sees itself, so that nothing is divided by zero. real: (B x keys).
    """
    if (real is None or bool(real.all())) and (not causal or queries == keys or queries == 1):
        return None
    at = torch.arange(keys - queries, keys, device=device)
    behind = torch.arange(keys, device=device)[None] <= at[:, None] if causal else torch.ones(
        queries, keys, dtype=torch.bool, device=device
    )  # fmt: skip
    if real is None:
        return behind[None, None]
    own = torch.arange(keys, device=device)[None] == at[:, None]
    return ((behind & real[:, None, :]) | own)[:, None]


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
