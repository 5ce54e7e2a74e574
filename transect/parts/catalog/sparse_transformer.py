"""Sparse Transformers (Child et al. 2019, arXiv:1904.10509): a strided pattern and a fixed one."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...arguments import Range
from ...errors import TransectError
from ..attention import joined, read
from ..sparse import SparseAttention, Window, blocked, everywhere, in_blocks, positions_of, real_at, surrounding


class Strided(SparseAttention):
    """Each position sees those less than `stride` away and every `stride`-th from it on, as one softmax.

    The strided pattern of Sparse Transformers (Section 4.2, A⁽¹⁾ and A⁽²⁾, as one head over their union).

    stride: best about the square root of the length.
    """

    kind = "mixer.strided"
    paper = "arXiv:1904.10509"
    limit = "with a stride of 1, or of all positions, it is softmax attention"
    cost = "N (stride + N / stride)"

    def __init__(self, width: int, heads: int, head_size: int, causal: bool, *, stride: Window = 64) -> None:
        super().__init__(width, heads, head_size, causal)
        self.stride = stride

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        return ((at - keys).abs() < self.stride) | ((at - keys) % self.stride == 0)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count = q.shape[2]
        size = min(self.stride, count)  # a block of all positions is none of more
        ahead = 0 if self.causal else size
        q = in_blocks(q * self.head_size**-0.5, size)  # B x heads x blocks x stride x size
        at = positions_of(count, size, 0, 0, q.device)[:, :, None]
        keys = positions_of(count, size, size, ahead, q.device)
        near = ((at - keys[:, None]).abs() < size) & self._behind(at, keys[:, None]) & real_at(real, keys)[:, :, None]
        near |= at == keys[:, None]
        pieces = [read(q, surrounding(k, size, size, ahead), surrounding(v, size, size, ahead), near[:, None])]
        columns, k, v = (one.transpose(2, 3) for one in (q, in_blocks(k, size), in_blocks(v, size)))
        at = at[..., 0].T  # stride x blocks: what sees one another at a distance
        far = self._behind(at[:, :, None], at[:, None]) & (at[:, :, None] != at[:, None])
        far = far & real_at(real, at)[:, :, None]
        y, sums = read(columns, k, v, far[:, None])
        pieces.append((y.transpose(2, 3), sums.transpose(2, 3)))
        return joined(pieces).flatten(2, 3)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        near = (2 if self.causal else 3) * min(self.stride, length)
        return 4 * length * (near + -(-length // self.stride)) * self._inner


class Fixed(SparseAttention):
    """Each position sees its own block of `stride` and the last `summary` positions of every other, as one softmax.

    The fixed pattern of Sparse Transformers (Section 4.2): what a block ends with can carry it on.

    stride: positions of a block; best about the square root of the length.
    summary: of these, how many all others see.
    """

    kind = "mixer.fixed"
    paper = "arXiv:1904.10509"
    limit = "with a summary of the whole block, or a block of all positions, it is softmax attention"
    cost = "N (stride + N summary / stride)"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, stride: Window = 64,
        summary: Annotated[int, Range(1, 2**20)] = 4,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        if summary > stride:
            raise TransectError(f"{self.kind}: a summary of {summary} is more than its block of {stride} positions has")
        self.stride, self.summary = stride, summary

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        own = at.div(self.stride, rounding_mode="floor") == keys.div(self.stride, rounding_mode="floor")
        return own | (keys % self.stride >= self.stride - self.summary)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count = q.shape[2]
        size = min(self.stride, max(count, self.summary))  # as above
        at = positions_of(count, size, 0, 0, q.device)  # blocks x stride
        k, v = (
            torch.cat([one, everywhere(one[:, :, :, -self.summary :].flatten(2, 3), len(at))], dim=3)
            for one in (in_blocks(k, size), in_blocks(v, size))
        )
        ends = at[:, -self.summary :].flatten()
        keys = torch.cat([at, ends.expand(len(at), -1)], dim=1)
        others = ends // size != torch.arange(len(at), device=q.device)[:, None]  # its own end a block has already
        counted = torch.cat([torch.ones_like(at, dtype=torch.bool), others], dim=1)
        return blocked(q, k, v, at, keys, counted & real_at(real, keys), self._behind)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        return 4 * length * (min(self.stride, length) + length // self.stride * self.summary) * self._inner
