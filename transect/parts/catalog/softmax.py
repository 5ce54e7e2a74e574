"""Softmax attention: what every other mixer is compared with (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..attention import Attention, seen_by, with_past
from ..part import Around


class Softmax(Attention):
    """softmax(q kᵀ / sqrt(head size)) v by heads, with the model's rotary positions, through torch's own attention.

    In generation keys and values are kept, as many as there were positions.

    bias: of the four matrices.
    """

    kind = "mixer.softmax"
    paper = "arXiv:1706.03762"
    limit = "it is the standard part"
    cost = "N²"
    recurrent = True  # though its state grows

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *, bias: bool = False
    ) -> None:
        super().__init__(width, heads, head_size, causal, key_value_heads=key_value_heads, bias=bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        real = around.real
        if around.state is not None:
            k, v, real = with_past(k, v, real, around.state)
        k, v = self.for_queries(k, v)
        mask = seen_by(q.shape[2], k.shape[2], self.causal, real, q.device)
        causal = mask is None and self.causal and q.shape[2] == k.shape[2]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * length * self.heads * self.head_size
