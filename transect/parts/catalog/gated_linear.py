"""Gated linear attention (Yang et al., ICML 2024, arXiv:2312.06635): a matrix as memory, whose rows decay."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional

from ...parameters import Range
from ..attention import Attention
from ..part import Around
from ..precision import wide
from ..recurrence import CHUNK, decayed_recurrence


class GatedLinear(Attention):
    """S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t: each head's memory forgets channel by channel, as x says.

    a_t = sigmoid(W₂ W₁ x_t + b)^(1/temperature); the heads' outputs are normed and gated by silu(W_g x) before o
    (Section 4.4). Keys are half as wide as values in the paper's models; here both have the config's head size.

    gate_rank: columns of W₂.
    temperature: the larger, the longer it remembers.
    """

    kind = "mixer.gated-linear"
    paper = "arXiv:2312.06635"
    limit = "none: without decay it is linear attention"
    can_be = ("causal",)
    cost = "N"
    recurrent = True

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, gate_rank: Annotated[int, Range(1, 4096)] = 16,
        temperature: Annotated[float, Range(0, above=True)] = 16.0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        inner, self.temperature = heads * head_size, temperature
        self.g_proj = nn.Linear(width, inner, bias=False)
        self.decay = nn.Sequential(nn.Linear(width, gate_rank, bias=False), nn.Linear(gate_rank, inner))
        self.norm = nn.RMSNorm(head_size, eps=1e-5)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        maps = (self.q_proj, self.k_proj, self.v_proj, self.decay)
        q, k, v, decay = (self.by_heads(one(x)) for one in maps)  # without positions: the decay tells them apart
        log_decay = functional.logsigmoid(wide(decay)) / self.temperature
        if around.real is not None:  # what is at padding is not remembered, and makes nothing forgotten
            real = around.real[:, None, :, None]
            k, log_decay = k * real, log_decay * real
        before = None if around.state is None else around.state.get("memory")
        y, memory = decayed_recurrence(q * self.head_size**-0.5, k, v, log_decay, before)
        if around.state is not None:
            around.state["memory"] = memory
        y = self.norm(y.transpose(1, 2)).to(x.dtype).flatten(2)
        return self.o_proj(y * functional.silu(self.g_proj(x)))

    def mixing_flops(self, length: int) -> int:
        return 4 * length * self.heads * self.head_size * (self.head_size + min(length, CHUNK))
