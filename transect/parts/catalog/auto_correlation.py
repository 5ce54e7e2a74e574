"""Auto-Correlation (Wu et al., NeurIPS 2021, arXiv:2106.13008): means over shifts of a series by its periods."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...arguments import Range
from ..attention import Attention
from ..part import Around
from ..precision import wide


class AutoCorrelation(Attention):
    """Σ_i w_i v[(t + τ_i) mod N] over the delays τ at which queries and keys correlate most, weighed by a softmax.

    R(τ) = Σ_t q[(t + τ) mod N] k[t], averaged over heads and channels; floor(factor log N) delays, at least one. In
    training all sequences of a batch take the delays of the batch's mean, each with weights of its own (Section 3.2).
    Positions enter by their order alone, so that the model's rotary positions are not used. What is at padding is 0.

    R(τ) is a sum over the whole series and the shifts go around its end, so that every output depends on every input:
    there is no causal form.

    factor: how many delays, over the logarithm of the length.
    direction: of the shift. `ahead` is the published one; `behind`, v[t - τ], is where a key that q repeats later lies.
        For a period of the whole series both are the same.
    """

    kind = "mixer.auto-correlation"
    paper = "arXiv:2106.13008"
    limit = "never softmax attention: with one delay it is a shift of the values"
    can_be = ("bidirectional",)
    cost = "N log N"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *,
        factor: Annotated[float, Range(0, 64, above=True)] = 1.0, direction: Literal["ahead", "behind"] = "ahead",
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, bias=True)
        self.inner, self.factor, self.direction = heads * head_size, factor, direction

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, k, v = (wide(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))  # B x N x inner
        if around.real is not None:
            q, k, v = (one * around.real[..., None] for one in (q, k, v))
        count = x.shape[1]
        sums = correlation(q, k)
        delays = min(count, max(1, math.floor(self.factor * math.log(count))))
        ranked = sums.mean(dim=0, keepdim=True).expand_as(sums) if self.training else sums
        chosen = ranked.topk(delays, dim=1).indices
        weights = torch.zeros_like(sums).scatter(1, chosen, sums.gather(1, chosen).softmax(1))
        return self.o_proj(shifted(v, weights, self.direction == "ahead").to(x.dtype))

    def mixing_flops(self, length: int) -> int:
        transforms = 4 * self.inner + 2  # of q, k, v and what comes out; of the correlation and the weights
        return round(2.5 * length * math.log2(max(length, 2)) * transforms) + 8 * length * self.inner


def correlation(q: Tensor, k: Tensor) -> Tensor:
    """R(τ) = Σ_t q[(t + τ) mod N] k[t], averaged over channels (... x N), of series (... x N x d); Wiener-Khinchin."""
    spectrum = torch.fft.rfft(q, dim=-2) * torch.fft.rfft(k, dim=-2).conj()
    return torch.fft.irfft(spectrum.mean(-1), n=q.shape[-2], dim=-1)


def shifted(v: Tensor, weights: Tensor, ahead: bool) -> Tensor:
    """Σ_τ w(τ) v[(t + τ) mod N], or t - τ where not ahead: v (... x N x d), weights (... x N)."""
    by = torch.fft.rfft(weights, dim=-1)[..., None]
    return torch.fft.irfft(torch.fft.rfft(v, dim=-2) * (by.conj() if ahead else by), n=v.shape[-2], dim=-2)
