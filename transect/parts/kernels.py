"""Attention whose scores are products of positive features: linear in the number of positions, with a state.

φ(q_t) Σ φ(k_s)ᵀ v_s / φ(q_t) Σ φ(k_s)ᵀ, over s <= t in a causal model.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .attention import Attention
from .part import Around
from .precision import wide
from .recurrence import decayed_recurrence

_LEAST = 1e-6  # of the denominator


class KernelAttention(Attention):
    """What all of them share; a subclass gives `features`."""

    cost = "N"
    recurrent = True

    def features(self, x: Tensor, of_keys: bool) -> Tensor:
        """φ of queries or keys (B x heads x N x size), positive, in float32 or wider."""
        raise NotImplementedError

    @property
    def features_of_a_head(self) -> int:
        """How many numbers φ gives."""
        return self.head_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        q, k = self.features(wide(q), of_keys=False), self.features(wide(k), of_keys=True)
        if around.real is not None:
            k = k * around.real[:, None, :, None]
        v = functional.pad(wide(v), (0, 1), value=1.0)  # the denominator is the sum of ones
        if self.causal:
            before = None if around.state is None else around.state.get("memory")
            y, memory = decayed_recurrence(q, k, v, None, before)
            if around.state is not None:
                around.state["memory"] = memory
        else:
            y = q @ (k.transpose(-1, -2) @ v)
        return y[..., :-1] / y[..., -1:].clamp_min(_LEAST)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * self.heads * self.features_of_a_head * (self.head_size + 1)
