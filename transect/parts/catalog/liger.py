"""Liger attention (Lan et al., ICML 2025, arXiv:2503.01496): a gated memory without a parameter, and a short window."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ..attention import Attention
from ..part import Around
from ..recurrence import CHUNK, decayed_recurrence
from ..rotary import rotated
from .local import windowed, with_window_before


class Liger(Attention):
    """alpha * memory + beta * softmax within a window (eq. 9), both from the same queries, keys and values.

    The memory's gate is the key itself, before it is turned by its position (Section 3.2; in the authors' code pooling
    is the identity for these two forms). Where the model norms its keys, the gate reads the normed ones (ours). With
    "gla" S_t = diag(sigmoid(k_t)^(1/16)) S_{t-1} + softmax(k_t) v_tᵀ, read by softmax(q_t) and not divided by anything;
    with "hgrn2" the decay is f_t = sigmoid(k_t) and what is written is 1 - f_t.

    gate: how the memory decays.
    window: how far softmax attention sees, the position itself included.
    alpha: weight of the memory.
    beta: weight of the window.
    """

    kind = "mixer.liger"
    paper = "arXiv:2503.01496"
    limit = "with alpha 0, beta 1 and a window of all positions it is softmax attention"
    can_be = ("causal",)
    cost = "N"
    recurrent = True

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *,
        gate: Literal["gla", "hgrn2"] = "gla", window: Annotated[int, Range(1, 2**20)] = 64,
        alpha: Annotated[float, Range(0, 1)] = 0.5, beta: Annotated[float, Range(0, 1)] = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, key_value_heads=key_value_heads)
        self.gate, self.window, self.alpha, self.beta = gate, window, alpha, beta

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, k, v = (self.by_heads(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        y = torch.zeros_like(q)
        if self.alpha:
            y = self.alpha * self._memory(q, k, v, around)
        if self.beta:
            q, k = rotated(q, around.rotary), rotated(k, around.rotary)
            k, v, real, window = with_window_before(k, v, around, self.window)
            k, v = self.for_queries(k, v)
            near = windowed(q, k, v, real, window, causal=True)
            y = y + self.beta * near
        return self.put_out(y, x)

    def _memory(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        """What the decaying memory gives each query (B x heads x N x head size)."""
        gate = k.float() if k.element_size() < 4 else k
        if self.gate == "gla":
            log_decay, written = functional.logsigmoid(gate) / 16, gate.softmax(-1)
        else:
            log_decay, written = functional.logsigmoid(gate), (-gate).sigmoid()
        if around.real is not None:  # what is at padding is not remembered, and makes nothing forgotten
            real = around.real[:, None, :, None]
            written, log_decay = written * real, log_decay * real
        written, log_decay, v = self.for_queries(written, log_decay, v)
        before = None if around.state is None else around.state.get("memory")
        y, memory = decayed_recurrence(q.softmax(-1), written, v, log_decay, before)
        if around.state is not None:
            around.state["memory"] = memory
        return y

    def mixing_flops(self, length: int) -> int:
        near, far = 2 * min(self.window, length), self.head_size + min(length, CHUNK)
        return 4 * length * self.heads * self.head_size * (near * (self.beta > 0) + far * (self.alpha > 0))
