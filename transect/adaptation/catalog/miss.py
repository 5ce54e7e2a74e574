"""Sums of shards: one small matrix under every column block."""

from __future__ import annotations

from typing import Annotated, Any

from ..registry import Range, adapter


def _numbers(d_out: int, d_in: int, rank: int) -> int | None:
    """The matrix that is added to every column block; the last of them may be cut."""
    return None if rank > d_in else d_out * rank


@adapter(
    "miss", paper="arXiv:2409.15371", size="rank", numbers=_numbers, largest=lambda d_out, d_in: d_in, only_linear=True
)
def miss(paths: list[str], *, rank: Annotated[int, Range(1, 2**20)] = 64) -> Any:
    """The later form of Bone: the same d_out x rank matrix is added to every column block of W; zero at the start.

    rank: columns of a block, and so the largest rank of the update.
    """
    from peft import MissConfig

    return MissConfig(r=rank, init_weights=True, target_modules=paths)
