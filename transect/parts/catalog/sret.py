"""SReT, Sliced Recursive Transformer (Shen et al., ECCV 2022, arXiv:2111.05297): attention within slices, and what
stands around each turn through a block that is gone through several times."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ..attention import some_real
from ..part import Around, BlockPart, Inside
from .softmax import Softmax


class Sliced(Softmax):
    """Softmax attention within each of G slices of positions that follow one another, so that scores cost N² / G.

    Where G does not divide N, the last slices are shorter. Of an image these are stripes of rows, not windows. Shuffled
    positions are put back before the output.

    groups: how many slices, G.
    shuffle: whether positions are permuted before they are sliced: `none`, `fixed` (one permutation for each block and
        number of positions, so that evaluation repeats itself; ours), or `random`, drawn anew in every call, also in
        evaluation, as the authors' code does.
    bias: of the four matrices.
    """

    kind = "mixer.sliced"
    paper = "arXiv:2111.05297"
    limit = "with one slice it is softmax attention"
    cost = "N² / G"
    can_be = ("bidirectional",)
    recurrent = False

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, layer: int, *,
        groups: Annotated[int, Range(1, 2**16)] = 4, shuffle: Literal["none", "fixed", "random"] = "none",
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, key_value_heads, head_size, causal, bias=bias)
        self.layer, self.groups, self.shuffle = layer, groups, shuffle

    def order(self, count: int) -> Tensor | None:
        """The permutation of so many positions; None where they stay."""
        if self.shuffle == "none" or self.groups == 1:
            return None
        draw = torch.Generator().manual_seed(self.layer) if self.shuffle == "fixed" else None
        return torch.randperm(count, generator=draw)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        k, v = self.for_queries(k, v)
        count = q.shape[2]
        size = -(-count // self.groups)
        lacking = -(-count // size) * size - count
        order = self.order(count)
        real = around.real
        if real is None and lacking:
            real = q.new_ones(len(q), count, dtype=torch.bool)
        if order is not None:
            order = order.to(q.device)
            q, k, v = (one[:, :, order] for one in (q, k, v))
            real = None if real is None else real[:, order]
        q, k, v = (functional.pad(one, (0, 0, 0, lacking)).unflatten(2, (-1, size)) for one in (q, k, v))
        mask = None
        if real is not None:  # B x 1 x slices x 1 x size
            mask = some_real(functional.pad(real, (0, lacking)).unflatten(1, (-1, size)))[:, None, :, None]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(2, 3)[:, :, :count]
        return y if order is None else y[:, :, order.argsort()]

    def mixing_flops(self, length: int) -> int:
        return 4 * length * -(-length // self.groups) * self.heads * self.head_size


class SReT(BlockPart):
    """One turn through a block, with learned weights of its sums, and a small network of its own behind it.

    x ← z₁ x + z₂ A(N(x)), x ← z₃ x + z₄ M(N'(x)) with the block's attention, MLP and norms, then
    x ← c₁ x + c₂ P(N''(x)) with P = Linear, GELU, Linear (non-linear projection layer, Section 3.3), which a block that
    stands at several places does not share. Its norm is a LayerNorm with an epsilon of 1e-6. All weights are 1 at
    first. The paper has one set of z for a block, and here each turn has its own.

    ratio: how wide the projection layer is, in widths of the stream; 0 leaves it out.
    """

    kind = "block.sret"
    paper = "arXiv:2111.05297"
    limit = "with weights z of 1 and c of 1 and 0 it is the block; with z of 1 and 0 as well it changes nothing"
    runs_sublayers = True

    def __init__(self, width: int, *, ratio: Annotated[float, Range(0, 64)] = 1.0) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.ones(4))
        inside = round(ratio * width)
        self.c = nn.Parameter(torch.ones(2)) if inside else None
        self.norm = nn.LayerNorm(width, eps=1e-6) if inside else None
        self.projection = (
            nn.Sequential(nn.Linear(width, inside), nn.GELU(), nn.Linear(inside, width)) if inside else None
        )

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        assert inside.attention is not None and inside.mlp is not None
        first, second = inside.norms
        x = self.z[0] * x + self.z[1] * inside.attention(first(x))
        x = self.z[2] * x + self.z[3] * inside.mlp(second(x))
        if self.projection is None or self.norm is None or self.c is None:
            return x
        return self.c[0] * x + self.c[1] * self.projection(self.norm(x))
