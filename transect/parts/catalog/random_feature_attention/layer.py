"""The layer as a mixer: what values alone can learn where the query-key matrices are random and stay so."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ....parameters import Seed
from ...part import Around, Mixer
from ...rotary import rotated

_SCORES = 2**20  # that are computed at once, so that they stay in the processor's cache


class RandomHeadsAttention(Mixer):
    """y_t = Σ_m O_m mean_s ReLU(ũ_tᵀ W_m ũ_s) V_m [x_s; 1], with W_m drawn once: values and output alone are trained.

    The mean is over the positions that t may see: nothing is normalised by the scores, which are no probabilities.
    ũ = [x / |x|; 1], so that the scores, and what `bias` is to them, do not depend on how the stream is normed; values
    read x itself. W_m = Q_mᵀ K_m + bias [I 0; 0 0] with Gaussian Q_m and K_m of the head size, whose product has
    entries of mean 0 and variance 1/4; the model's rotary positions, where it has any, turn Q_m ũ_t and K_m ũ_s.

    bias: added to every W_m on the diagonal: a head scores higher what is like the query.
    seed: of Q and K; every block has its own.
    """

    kind = "mixer.random-feature-attention"
    paper = "arXiv:2307.11353"
    limit = "none: its scores are not normalised, and their matrices are not trained"
    cost = "N²"
    roles = {"v": "v_proj", "o": "o_proj"}
    queries: Tensor
    keys: Tensor

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, layer: int, *,
        bias: Annotated[float, Range(0, 1000)] = 0.0, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        self.heads, self.head_size, self.bias = heads, head_size, bias
        drawn = torch.empty(2, heads * head_size, width + 1)
        if drawn.device.type != "meta":
            draw = torch.Generator().manual_seed(seed)
            for _ in range(layer + 1):
                numbers = torch.randn(drawn.shape, generator=draw, device="cpu")
            drawn.copy_(numbers * (4 * head_size) ** -0.25)
        self.register_buffer("queries", drawn[0].clone())
        self.register_buffer("keys", drawn[1].clone())
        self.v_proj = nn.Linear(width, heads * head_size)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        units = functional.normalize(x, dim=-1)
        extended = functional.pad(units, (0, 1), value=1.0)
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (extended @ self.queries.T, extended @ self.keys.T, self.v_proj(x))
        )  # B x heads x N x head size
        q, k = rotated(q, around.rotary), rotated(k, around.rotary)
        real = x.new_ones(1, x.shape[1]) if around.real is None else around.real.to(x.dtype)
        v = v * real[:, None, :, None]
        rows = max(16, _SCORES // (x.shape[0] * self.heads * x.shape[1]))
        pieces = [self._read(slice(at, at + rows), q, k, v, units) for at in range(0, x.shape[1], rows)]
        y = torch.cat(pieces, dim=2)  # the sums over the positions
        count = real.cumsum(1) if self.causal else real.sum(1, keepdim=True)
        y = y / count.clamp(min=1)[:, None, :, None]
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))

    def _read(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, units: Tensor) -> Tensor:
        """Σ_s ReLU(score of t and s) v_s for some queries t (B x heads x rows x head size)."""
        seen = min(rows.stop, k.shape[2]) if self.causal else k.shape[2]
        scores = q[:, :, rows] @ k[:, :, :seen].mT
        if self.bias:
            scores = scores + self.bias * (units[:, rows] @ units[:, :seen].mT)[:, None]
        if self.causal:
            scores = scores.tril_(rows.start)
        return scores.relu_() @ v[:, :, :seen]

    @property
    def flops(self) -> int:
        return super().flops + 2 * (self.queries.numel() + self.keys.numel())

    def mixing_flops(self, length: int) -> int:
        alike = 2 * (self.queries.shape[1] - 1) if self.bias else 0
        return length * length * (4 * self.heads * self.head_size + alike)
