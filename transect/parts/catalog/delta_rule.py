"""DeltaNet (Yang et al., NeurIPS 2024, arXiv:2406.06484): a matrix as memory, corrected, not added to."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ..attention import Attention
from ..part import Around
from ..precision import wide
from ..recurrence import CHUNK, delta_recurrence


class DeltaRule(Attention):
    """S_t = S_{t-1}(I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ, y_t = S_t q_t: what the memory gives for k_t is moved to v_t.

    β_t = sigmoid(w_b x_t) of each head. Queries, keys and values pass a short causal convolution of each channel and
    silu; queries and keys then have length 1. The heads' outputs are normed before o (Section 3.4).

    gated: whether the memory also decays, S_{t-1} by a_t = exp(-e^A softplus(w_a x_t + c)) of each head: the gated
        delta rule (arXiv:2412.06464).
    taps: of the convolution, the position itself included; 1 is none.
    """

    kind = "mixer.delta-rule"
    paper = "arXiv:2406.06484"
    limit = "none: with keys orthogonal to one another and β = 1 it is linear attention"
    can_be = ("causal",)
    cost = "N"
    recurrent = True

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, gated: bool = False,
        taps: Annotated[int, Range(1, 64)] = 4,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        inner, self.taps = heads * head_size, taps
        self.beta = nn.Linear(width, heads, bias=False)
        if taps > 1:
            bound = taps**-0.5
            self.convolution = nn.Parameter(torch.empty(taps, 3 * inner).uniform_(-bound, bound))  # the last tap is now
        self.decay = None
        if gated:
            self.decay = nn.Linear(width, heads)
            self.rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())  # A
            step = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
            with torch.no_grad():
                self.decay.bias.copy_(step + (-(-step).expm1()).log())  # softplus of it is the step
        self.norm = nn.RMSNorm(head_size, eps=1e-5)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        real = None if around.real is None else around.real[..., None]
        q, k, v = (
            self.by_heads(functional.silu(one)) for one in self._convolved(self._maps(x, real), around.state)
        )  # B x h x N x head size
        q, k = (functional.normalize(wide(one), dim=-1) for one in (q, k))
        beta, log_decay = wide(self.beta(x)).sigmoid(), None
        if self.decay is not None:
            log_decay = -wide(self.rate).exp() * functional.softplus(wide(self.decay(x)))
        if real is not None:  # what is at padding changes nothing in the memory
            beta, log_decay = beta * real, None if log_decay is None else log_decay * real
        memory = None if around.state is None else around.state.get("memory")
        y, memory = delta_recurrence(
            q * self.head_size**-0.5, k, v, beta.mT[..., None], None if log_decay is None else log_decay.mT[..., None],
            memory,
        )  # fmt: skip
        if around.state is not None:
            around.state["memory"] = memory
        return self.o_proj(self.norm(y.transpose(1, 2)).to(x.dtype).flatten(2))

    def _maps(self, x: Tensor, real: Tensor | None) -> list[Tensor]:
        """What queries, keys and values are made of (B x N x inner each), zeros at padding."""
        maps = [one(x) for one in (self.q_proj, self.k_proj, self.v_proj)]
        return maps if real is None or self.taps == 1 else [one * real for one in maps]

    def _convolved(self, maps: list[Tensor], state: dict[str, Tensor] | None) -> list[Tensor]:
        """Each channel with its values just before, zeros in front; the last of these are kept."""
        if self.taps == 1:
            return maps
        lags, last = self.taps - 1, state.get("before") if state is not None else None
        if state is not None:
            ends = torch.cat([one[:, -lags:] for one in maps], dim=-1)
            state["before"] = ends if last is None else torch.cat([last, ends], dim=1)[:, -lags:]
            missing = lags - state["before"].shape[1]
            state["before"] = functional.pad(state["before"], (0, 0, missing, 0))
        before = [None] * 3 if last is None else last.chunk(3, dim=-1)
        weights = self.convolution.to(maps[0].dtype).chunk(3, dim=-1)
        return [_taps(*one) for one in zip(maps, weights, before, strict=True)]

    @property
    def flops(self) -> int:
        return super().flops + (2 * self.convolution.numel() if self.taps > 1 else 0)

    def mixing_flops(self, length: int) -> int:
        chunk, size = min(length, CHUNK), self.head_size
        return length * self.heads * (8 * chunk * size + 8 * size**2 + 2 * size**3 // chunk)


def _taps(x: Tensor, weights: Tensor, before: Tensor | None) -> Tensor:
    """Σ_l w_l x_{t-l} by channels of x (B x N x c). weights: taps x c, newest last. before: in front of x."""
    y, count = x * weights[-1], x.shape[1]
    for lag, weight in enumerate(weights[:-1].flip(0), 1):
        y[:, lag:].addcmul_(x[:, : max(0, count - lag)], weight)
        if before is not None:
            first = before.shape[1] - lag
            y[:, :lag].addcmul_(before[:, first : first + min(lag, count)], weight)
    return y
