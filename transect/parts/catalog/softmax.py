"""Softmax attention: what every other mixer is compared with (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..part import Around, Mixer
from ..rotary import rotated


class Softmax(Mixer):
    """softmax(q kᵀ / sqrt(head size)) v by heads, with the model's rotary positions, through torch's own attention.

    In generation keys and values are kept, as many as there were positions.

    bias: of the four matrices.
    """

    kind = "mixer.softmax"
    paper = "arXiv:1706.03762"
    limit = "it is the standard part"
    cost = "N²"
    recurrent = True  # though its state grows
    roles = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *, bias: bool = False
    ) -> None:
        super().__init__(causal)
        self.heads, self.key_value_heads, self.head_size = heads, key_value_heads, head_size
        self.q_proj = nn.Linear(width, heads * head_size, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * head_size, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * head_size, bias=bias)
        self.o_proj = nn.Linear(heads * head_size, width, bias=bias)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # B x heads x N x head size
        q, k = rotated(q, around.rotary), rotated(k, around.rotary)
        real = around.real
        if around.state is not None:
            k, v, real = _with_past(k, v, real, around.state)
        groups = self.heads // self.key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = seen_by(q.shape[2], k.shape[2], self.causal, real, x.device)
        causal = mask is None and self.causal and q.shape[2] == k.shape[2]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def mixing_flops(self, length: int) -> int:
        return 4 * length * length * self.heads * self.head_size


def _with_past(k: Tensor, v: Tensor, real: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values so far, with which of them are real; they are kept with the positions in dimension 2."""
    real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if real is None else real
    for name, tensor, dim in (("k", k, 2), ("v", v, 2), ("real", real, 1)):
        state[name] = torch.cat([state[name], tensor], dim=dim) if name in state else tensor
    return state["k"], state["v"], state["real"]


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
