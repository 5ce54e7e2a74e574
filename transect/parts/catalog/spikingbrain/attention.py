"""The mixer: gated linear attention without positions, softmax attention within a window, or the sum of both."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ...attention import Attention
from ...part import Around
from ...precision import wide
from ...recurrence import CHUNK, decayed_recurrence
from ...rotary import rotated
from ..local import windowed, with_window_before

_GAIN = 2**-2.5  # of the gate's first numbers, in the authors' code


class SpikingBrain(Attention):
    """Linear: S_t = diag(g_t) S_{t-1} + k_t v_tᵀ read by q_t / sqrt(head size), normed for each head by itself.

    Queries and keys pass a map that is nowhere negative, and are not turned. log g_t is logsigmoid(W₂ W₁ x_t + b) / 16
    for each channel of a key; without a rank of its own the gate is tied to the key, g_t = 1 - k_t. The window is
    softmax attention as it was. Both: their outputs, each normed by heads, are added (the report does not say which
    norm; ours). The learned sinks of the larger model are not here.

    branches: linear, window, or both.
    feature: the map; sigmoid where gates are tied to keys.
    gate_rank: rows of W₁; 0 ties the gate to the key.
    window: how far softmax attention sees, the position itself included.
    """

    kind = "mixer.spikingbrain"
    paper = "arXiv:2509.05276"
    limit = "with branches window and a window of all positions it is softmax attention"
    can_be = ("causal",)
    cost = "N"
    recurrent = True

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *,
        branches: Literal["linear", "window", "both"] = "linear", feature: Literal["relu", "sigmoid"] = "relu",
        gate_rank: Annotated[int, Range(0, 4096)] = 16, window: Annotated[int, Range(1, 2**20)] = 4096,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, key_value_heads=key_value_heads)
        self.branches, self.window = branches, window
        self.feature = "sigmoid" if not gate_rank else feature
        self.decay = self.norm = self.near_norm = None
        if branches != "window":
            self.norm = nn.RMSNorm(head_size, eps=1e-6)
            if gate_rank:
                first = nn.Linear(width, gate_rank, bias=False)
                second = nn.Linear(gate_rank, self.key_value_heads * head_size)
                for linear in (first, second):
                    nn.init.xavier_uniform_(linear.weight, gain=_GAIN)
                nn.init.zeros_(second.bias)
                self.decay = nn.Sequential(first, second)
        if branches == "both":
            self.near_norm = nn.RMSNorm(head_size, eps=1e-6)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, k, v = (self.by_heads(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        y = None
        if self.norm is not None:
            y = self.norm(self.linear(x, q, k, v, around))
        if self.branches != "linear":
            near = self._near(q, k, v, around)
            y = near if y is None or self.near_norm is None else y + self.near_norm(near)
        assert y is not None
        return self.put_out(y, x)

    def linear(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        """What the memory gives each query (B x heads x N x head size), without its norm."""
        keys, queries = (one.sigmoid() if self.feature == "sigmoid" else one.relu() for one in (wide(k), wide(q)))
        if self.decay is None:
            log_decay = functional.logsigmoid(-wide(k))  # of 1 - sigmoid(k)
        else:
            log_decay = functional.logsigmoid(wide(self.by_heads(self.decay(x)))) / 16
        if around.real is not None:  # what is at padding is not remembered, and makes nothing forgotten
            real = around.real[:, None, :, None]
            keys, log_decay = keys * real, log_decay * real
        state = {} if around.state is None else around.state
        y, state["memory"] = decayed_recurrence(
            queries * self.head_size**-0.5, keys, v, log_decay, state.get("memory")
        )  # fmt: skip
        return y

    def _near(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        """What softmax within the window gives each query."""
        q, k = rotated(q, around.rotary), rotated(k, around.rotary)
        k, v, real, window = with_window_before(k, v, around, self.window)
        k, v = self.for_queries(k, v)
        return windowed(q, k, v, real, window, causal=True)

    def mixing_flops(self, length: int) -> int:
        near = self.heads * 4 * min(self.window, length) * (self.branches != "linear")
        far = self.heads * 2 * min(length, CHUNK)
        memory = (self.heads + self.key_value_heads) * self.head_size  # read by queries' heads, written by keys'
        return 2 * length * self.head_size * (near + (far + memory) * (self.branches != "window"))
