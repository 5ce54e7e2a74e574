"""Sums of shards: one small matrix under every column block."""

from __future__ import annotations

from typing import Annotated, Any

from ..registry import Range, adapter


@adapter("miss", paper="arXiv:2409.15371", size="rank", numbers=lambda d_out, d_in, rank: d_out * rank,
         largest=lambda d_out, d_in: d_in)  # fmt: skip
def miss(paths: list[str], *, rank: Annotated[int, Range(1, 2**20)] = 64) -> Any:
    """The later form of Bone: the same d_out x rank matrix is added to every column block of W; zero at the start.

    rank: columns of a block, and so the largest rank of the update.
    """
    from peft import MissConfig

    return MissConfig(r=rank, init_weights=True, target_modules=paths)
