"""Transformer-XL (Dai et al., ACL 2019, arXiv:1901.02860): segments, and a memory of what was before each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..part import Around
from ..sparse import Few, SparseAttention, Window, blocked, in_blocks, positions_of, real_at, surrounding


class TransformerXL(SparseAttention):
    """Each position sees its own segment and so many positions before it, as Transformer-XL's memory lets it.

    No gradient goes through the memory to what it was computed from (Section 3.2), only to the matrices.

    segment: positions of a segment.
    memory: how many before it are seen.
    """

    kind = "mixer.transformer-xl"
    paper = "arXiv:1901.02860"
    limit = "with a segment of all positions it is softmax attention"
    cost = "N"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, segment: Window = 64, memory: Few = 64
    ) -> None:
        super().__init__(width, heads, head_size, causal)
        self.segment, self.memory = segment, memory

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        start = at.div(self.segment, rounding_mode="floor") * self.segment
        return (keys >= start - self.memory) & (keys < start + self.segment)

    def project(self, x: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; in training, k and v have behind their channels those through which no gradient goes to x."""
        q, k, v = super().project(x, around)
        if torch.is_grad_enabled() and around.state is None:
            _, old_k, old_v = super().project(x.detach(), around)
            k, v = torch.cat([k, old_k], dim=-1), torch.cat([v, old_v], dim=-1)
        return q, k, v

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count = q.shape[2]
        size, memory = min(self.segment, count), min(self.memory, count)  # of what is there
        at, keys = (positions_of(count, size, before, 0, q.device) for before in (0, memory))
        k, v = (self._behind_memory(one, size, memory) for one in (k, v))
        return blocked(q, k, v, at, keys, real_at(real, keys), self._behind)[:, :, :count]

    def _behind_memory(self, one: Tensor, segment: int, memory: int) -> Tensor:
        """Each segment's keys or values behind those of its memory (B x heads x blocks x (memory + segment) x size)."""
        old = one[..., -self.head_size :]
        before = surrounding(old, segment, memory, 0)[..., :memory, :]
        return torch.cat([before, in_blocks(one[..., : self.head_size], segment)], dim=3)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * min(self.segment + self.memory, length) * self._inner
