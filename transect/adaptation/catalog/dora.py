"""Low-rank updates of the direction of a weight, and its magnitude apart."""

from __future__ import annotations

from typing import Any

from ..registry import adapter
from .lora import Positive, Rank, Share, of_pair


def _numbers(d_out: int, d_in: int, rank: int) -> int:
    return of_pair(d_out, d_in, rank) + d_out


@adapter("dora", paper="arXiv:2402.09353", size="rank", numbers=_numbers)
def dora(paths: list[str], *, rank: Rank = 8, alpha: Positive = 16.0, dropout: Share = 0.0) -> Any:
    """LoRA on the direction of W, whose rows (as PEFT has it) are normed, and a trained magnitude for each of them.

    rank: of the updates.
    alpha: what scales them, divided by the rank.
    dropout: of what the updates read.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=True, target_modules=paths,  # type: ignore[arg-type]
    )  # fmt: skip
