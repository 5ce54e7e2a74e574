"""Low-rank updates."""

from __future__ import annotations

from typing import Annotated, Any

from ..registry import Range, adapter

Rank = Annotated[int, Range(1, 2**20)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1, below=True)]


def of_pair(d_out: int, d_in: int, rank: int) -> int:
    """Numbers of B (d_out x rank) and A (rank x d_in)."""
    return rank * (d_out + d_in)


@adapter("lora", paper="arXiv:2106.09685", size="rank", numbers=of_pair)
def lora(paths: list[str], *, rank: Rank = 8, alpha: Positive = 16.0, dropout: Share = 0.05) -> Any:
    """Low-rank updates beside the frozen weights: W + (alpha / rank) B A, with B zero at the start.

    rank: of the updates.
    alpha: what scales them, divided by the rank.
    dropout: of what the updates read.
    """
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=paths)  # type: ignore[arg-type]
