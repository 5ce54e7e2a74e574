"""Reformer (Kitaev et al., ICLR 2020, arXiv:2001.04451): attention within buckets of locality-sensitive hashing."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ...parameters import Seed
from ..buckets import BucketAttention


class Reformer(BucketAttention):
    """Buckets by locality-sensitive hashing, in several rounds: argmax [x R; -x R] for random R (Section 2).

    window: how many places away, in the bucket, a position is seen.
    buckets: how many, even; 1 for none.
    rounds: of hashing, each with an R of its own; what is seen in several counts once.
    seed: of R.
    """

    kind = "mixer.reformer"
    paper = "arXiv:2001.04451"
    limit = "with one bucket and a window of all positions it is softmax attention with keys q / |q|, itself not seen"
    directions: Tensor

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, layer: int, *,
        window: Annotated[int, Range(1, 2**20)] = 64, buckets: Annotated[int, Range(1, 2**16)] = 16,
        rounds: Annotated[int, Range(1, 64)] = 2, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, window)
        if buckets > 1 and buckets % 2:
            raise TransectError(
                f"{self.kind}: a direction and its opposite are two buckets, so that {buckets} are none"
            )
        drawn = torch.empty(rounds, head_size, buckets // 2)
        if drawn.device.type != "meta":
            draw = torch.Generator().manual_seed((seed + layer) % 2**63)
            drawn.copy_(torch.randn(drawn.shape, generator=draw, device="cpu"))
        self.register_buffer("directions", drawn)

    def matched(self, q: Tensor, buckets: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        return q, functional.normalize(q, dim=-1)

    def buckets(self, q: Tensor, real: Tensor | None) -> Tensor:
        if not self.directions.shape[-1]:
            return torch.zeros(len(self.directions), *q.shape[:3], dtype=torch.long, device=q.device)
        along = torch.einsum("bhnd,rdc->rbhnc", q, self.directions.to(q.dtype))
        return torch.cat([along, -along], dim=-1).argmax(-1)

    def mixing_flops(self, length: int) -> int:
        rounds, _, half = self.directions.shape
        keys = (2 if self.causal else 3) * min(self.window, length)
        return rounds * length * self.heads * self.head_size * (2 * half + 4 * keys)
