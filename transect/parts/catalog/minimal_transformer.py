"""Attention with fewer matrices, and no MLP (Bermeitinger et al. 2024, arXiv:2410.13732).

S_h = X M_h Xᵀ / sqrt(size) with one matrix M for queries and keys, which may be symmetric, and values that are merged
with the output, or are the input itself. Several heads work on slices of the stream (x as H blocks of d / H), since a
whole M for each would hold more numbers than the two that it replaces.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import TransectError
from ..attention import seen_by
from ..part import Around, Mixer, MLPPart


class Minimal(Mixer):
    """Softmax attention from one similarity matrix, with one matrix for values and output, or none.

    It knows no positions but those that are in the stream: with rotary positions between query and key the two
    matrices would not be one.

    similarity: `merged`, any M, or `symmetric`, M = T Tᵀ with T lower triangular.
    values: `merged`, one matrix P in the place of values and output, or `none`, so that every position is given a
        convex combination of the inputs.
    """

    kind = "mixer.minimal"
    paper = "arXiv:2410.13732"
    limit = "with one head and without positions, M = Wqᵀ Wk and P = Wo Wv it is softmax attention"
    cost = "N²"

    def __init__(
        self, width: int, heads: int, causal: bool, *, similarity: Literal["merged", "symmetric"] = "merged",
        values: Literal["merged", "none"] = "merged",
    ) -> None:  # fmt: skip
        super().__init__(causal)
        if width % heads:
            raise TransectError(f"{heads} heads do not divide a width of {width}")
        self.width, self.heads, self.similarity = width, heads, similarity
        size = width // heads
        self.factor = nn.Parameter(torch.randn(heads, size, size) * size**-0.5)  # M, or T below its diagonal
        self.output = nn.Linear(width, width, bias=False) if values == "merged" else nn.Identity()

    def similarities(self) -> Tensor:
        """M of each head (heads x size x size)."""
        if self.similarity == "merged":
            return self.factor
        lower = self.factor.tril()
        return lower @ lower.transpose(-1, -2)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        parts = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x N x size
        count = x.shape[1]
        mask = seen_by(count, count, self.causal, around.real, x.device)
        y = functional.scaled_dot_product_attention(
            parts @ self.similarities(), parts, parts, attn_mask=mask, is_causal=mask is None and self.causal
        )
        return self.output(y.transpose(1, 2).flatten(2))

    @property
    def flops(self) -> int:
        return super().flops + 2 * self.factor.numel()

    def mixing_flops(self, length: int) -> int:
        return 4 * length * length * self.width


class NoMLP(MLPPart):
    """Adds nothing: the block is attention alone."""

    kind = "mlp.none"
    paper = "arXiv:2410.13732"
    limit = "none: it does nothing"

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x
