"""Compressive Transformers (Rae et al., ICLR 2020, arXiv:1911.05507): older memory is seen in means."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...arguments import Range
from ...errors import TransectError
from ..sparse import Few, Window, blocked, in_blocks, positions_of, real_at, surrounding
from .transformer_xl import TransformerXL


class Compressive(TransformerXL):
    """Transformer-XL's segments, behind whose memory older positions are seen as means of `rate` of them each.

    The mean is the simplest of the paper's compressions (Section 3.2); no gradient goes through it, as through memory.

    segment: positions of a segment.
    memory: how many before it are seen as they are.
    compressed: how many means before these are seen.
    rate: positions in a mean; segment and memory are multiples of it.
    """

    kind = "mixer.compressive"
    paper = "arXiv:1911.05507"
    recurrent = False  # a rule of which positions are seen does not say it

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, segment: Window = 64, memory: Few = 64,
        compressed: Few = 64, rate: Annotated[int, Range(1, 2**16)] = 4,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, segment=segment, memory=memory)
        if segment % rate or memory % rate:
            raise TransectError(
                f"{self.kind}: a segment of {segment} and a memory of {memory} should be multiples of the rate, {rate}"
            )
        self.compressed, self.rate = compressed, rate

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count, rate = q.shape[2], self.rate
        compressed = min(self.compressed, -(-count // rate))  # of what is there, as the others
        size, memory = (min(one, -(-count // rate) * rate) for one in (self.segment, self.memory))
        each, before = size // rate, memory // rate + compressed  # means of a segment, and in front of it
        at, keys = (positions_of(count, size, before, 0, q.device) for before in (0, memory))
        means = (in_blocks(one[..., -self.head_size :], rate).mean(-2) for one in (k, v))
        old_k, old_v = (surrounding(one, each, before, 0)[:, :, : len(at), :compressed] for one in means)
        last = positions_of(-(-count // size) * each, each, before, 0, q.device)[:, :compressed] * rate + rate - 1
        k, v = (torch.cat([old, self._behind_memory(one, size, memory)], 3) for old, one in ((old_k, k), (old_v, v)))
        keys = torch.cat([last, keys], dim=1)
        return blocked(q, k, v, at, keys, real_at(real, keys), self._behind)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        return super().mixing_flops(length) + 4 * length * min(self.compressed, length // self.rate) * self._inner
