"""Liger attention (Lan et al., ICML 2025, arXiv:2503.01496): a gated memory without a parameter, and a short window."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..attention import Attention
from ..part import Around
from ..precision import wide
from ..recurrence import CHUNK, decayed_recurrence, value_decayed_recurrence
from ..rotary import rotated
from .local import windowed, with_window_before


class Liger(Attention):
    """alpha * memory + beta * softmax within a window (eq. 9), both from the same queries, keys and values.

    The memory's gate is the key itself, before it is turned by its position (Section 3.2), or means over runs of its
    channels. In the authors' code these are runs of one channel for "gla" and "hgrn2", and so they are here unless
    `gates` says otherwise. Where the model norms its queries and keys, memory and gate read the normed ones (ours: how
    long they were before says nothing in such a model). All of the memory is in float32 or wider.
    gla: S_t = diag(sigmoid(k_t)^(1/16)) S_{t-1} + softmax(k_t) v_tᵀ, read by softmax(q_t), and not divided by anything.
    hgrn2: the decay is f_t = sigmoid(k_t), and what is written is 1 - f_t.
    gsa: m slots with a key and a value each. With a_t = sigmoid(g_t)^(1/16) of the m means g_t, both memories go on as
    diag(a_t) S_{t-1} + (1 - a_t) x_tᵀ, with x the keys and the values; a query reads softmax(K_t q_t) of the latter.

    gate: how the memory decays.
    gates: numbers of a head's gate, each the mean over a run of the key's channels; 0 is every channel by itself, and
        with gsa, whose slots they are, half as many.
    window: how far softmax attention sees, the position itself included.
    alpha: weight of the memory.
    beta: weight of the window, 1 - alpha.
    """

    kind = "mixer.liger"
    paper = "arXiv:2503.01496"
    limit = "with alpha 0, beta 1 and a window of all positions it is softmax attention"
    can_be = ("causal",)
    cost = "N"
    recurrent = True

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *,
        gate: Literal["gla", "hgrn2", "gsa"] = "gla", gates: Annotated[int, Range(0, 2**16)] = 0,
        window: Annotated[int, Range(1, 2**20)] = 64, alpha: Annotated[float, Range(0, 1)] = 0.5,
        beta: Annotated[float, Range(0, 1)] = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, key_value_heads=key_value_heads)
        check_settings(head_size, gates, alpha, beta)
        self.gate, self.window, self.alpha, self.beta = gate, window, alpha, beta
        self.gates = gates or (max(1, head_size // 2) if gate == "gsa" else head_size)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, k, v = (self.by_heads(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        y = torch.zeros_like(q)
        if self.alpha:
            y = self.alpha * self._memory(x, q, k, v, around)
        if self.beta:
            q, k = rotated(q, around.rotary), rotated(k, around.rotary)
            k, v, real, window = with_window_before(k, v, around, self.window)
            k, v = self.for_queries(k, v)
            near = windowed(q, k, v, real, window, causal=True)
            y = y + self.beta * near
        return self.put_out(y, x)

    def decay_of(self, x: Tensor, k: Tensor) -> Tensor:
        """The log decay (B x key heads x N x gates), of the part's input x and its keys."""
        source = wide(k)
        if self.gates < self.head_size:
            source = functional.adaptive_avg_pool1d(source.flatten(0, 2)[:, None], self.gates).view(
                *source.shape[:-1], self.gates
            )
        return functional.logsigmoid(source) / (1 if self.gate == "hgrn2" else 16)

    def _memory(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        """What the decaying memory gives each query (B x heads x N x head size)."""
        log_decay = self.decay_of(x, k)
        if self.gate != "gsa" and self.gates < self.head_size:  # each number for the run that it is the mean of
            run = torch.arange(self.head_size, device=k.device) * self.gates // self.head_size
            log_decay = log_decay[..., run]
        written = wide(k).softmax(-1) if self.gate == "gla" else -torch.expm1(log_decay)
        if around.real is not None:  # what is at padding is not remembered, and makes nothing forgotten
            real = around.real[:, None, :, None]
            written, log_decay = written * real, log_decay * real
        state = {} if around.state is None else around.state
        if self.gate == "gsa":
            scores, state["slots"] = value_decayed_recurrence(q, k, written, log_decay, state.get("slots"))
            q = scores  # of the slots
        y, state["memory"] = decayed_recurrence(wide(q).softmax(-1), written, v, log_decay, state.get("memory"))
        return y

    def mixing_flops(self, length: int) -> int:
        near, chunk = 4 * min(self.window, length) * (self.beta > 0), min(length, CHUNK)
        size, far = self.head_size, 2 * chunk  # a memory is written by the keys' heads, and read by the queries'
        if self.gate == "gsa":  # two memories of as many rows as slots
            size, far = 2 * self.gates, 2 * (chunk + chunk * self.gates // self.head_size)
        memory = (self.heads * (size + far) + self.key_value_heads * size) * (self.alpha > 0)
        return 2 * length * self.head_size * (self.heads * near + memory)


def check_settings(head_size: int, gates: int, alpha: float, beta: float) -> None:
    """TransectError unless the weights sum to 1, and the gates are no more than the channels of a head."""
    if abs(alpha + beta - 1) > 1e-6:
        raise TransectError(f"liger: alpha + beta should be 1, not {alpha:g} + {beta:g}")
    if gates > head_size:
        raise TransectError(f"liger: gates={gates} are means of the {head_size} channels of a head: choose fewer")
