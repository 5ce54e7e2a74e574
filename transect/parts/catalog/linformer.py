"""Linformer (Wang et al. 2020, arXiv:2006.04768): keys and values of all positions, mapped to a few of each."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..attention import Attention
from ..part import Around


class Linformer(Attention):
    """softmax(q (E k)ᵀ / sqrt(head size)) (F v), with E and F (rank x length) that all heads share (equation 7).

    E and F know a fixed number of positions; fewer take their first columns. Every position enters each of the mapped
    keys, so that there is no causal form. E and F begin as N(0, 1 / length).

    rank: mapped keys and values.
    """

    kind = "mixer.linformer"
    paper = "arXiv:2006.04768"
    limit = "with a rank of all positions and E = F = I it is softmax attention"
    can_be = ("bidirectional",)
    cost = "N"

    def __init__(
        self, width: int, heads: int, head_size: int, length: int, causal: bool, *,
        rank: Annotated[int, Range(1, 2**20)] = 64,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        if length < 1:
            raise TransectError(
                f"{self.kind} needs a fixed number of positions, which this model's config does not give"
            )
        if rank > length:
            raise TransectError(
                f"{self.kind}: a rank of {rank} is more than the {length} positions that the model takes; choose at "
                f"most {length}"
            )
        self.length = length
        self.key_map, self.value_map = (nn.Parameter(torch.randn(rank, length) * length**-0.5) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        count = k.shape[2]
        if count > self.length:
            raise TransectError(f"{self.kind} maps {self.length} positions at most, and there are {count}")
        if around.real is not None:
            k, v = (one * around.real[:, None, :, None].to(one.dtype) for one in (k, v))
        k, v = self.key_map[:, :count] @ k, self.value_map[:, :count] @ v
        return functional.scaled_dot_product_attention(q, k, v)

    def mixing_flops(self, length: int) -> int:
        return 8 * length * len(self.key_map) * self.heads * self.head_size
