"""Pooled queries (Funnel-Transformer, Dai et al., NeurIPS 2020, arXiv:2006.03236): several positions read as one."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ..attention import Attention, some_real
from ..part import Around
from .nystrom import segments


class Funnel(Attention):
    """softmax(mean(q) kᵀ / sqrt(head size)) v, with means over `stride` positions in a row, which all are given it.

    The paper pools the stream between blocks and repeats it at the end (Section 2.2). Here the stream keeps its length,
    so that each block does both, and what tells positions of a group apart goes by in the stream. A mean looks ahead:
    there is no causal form.

    stride: positions that share a query.
    """

    kind = "mixer.funnel"
    paper = "arXiv:2006.03236"
    limit = "with a stride of 1 it is softmax attention"
    can_be = ("bidirectional",)
    cost = "N² / stride"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, stride: Annotated[int, Range(1, 2**16)] = 2
    ) -> None:
        super().__init__(width, heads, head_size, causal)
        self.stride = stride

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        count = q.shape[2]
        real = q.new_ones(1, count, dtype=q.dtype) if around.real is None else some_real(around.real).to(q.dtype)
        counts = segments(real[:, None, :, None], self.stride).clamp(min=1)
        q = segments(q * real[:, None, :, None], self.stride) / counts
        mask = None if around.real is None else (real > 0)[:, None, None]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.repeat_interleave(self.stride, dim=2)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        return 4 * length * -(-length // self.stride) * self.heads * self.head_size
