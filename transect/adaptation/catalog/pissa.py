"""Low-rank factors that start as the leading singular components of the weight."""

from __future__ import annotations

from typing import Any

from ..registry import adapter
from .lora import Rank, Share, of_pair


@adapter("pissa", paper="arXiv:2404.02948", size="rank", numbers=of_pair, rewrites=True)
def pissa(paths: list[str], *, rank: Rank = 8, dropout: Share = 0.0) -> Any:
    """LoRA whose factors start as the leading singular components of W, with the rest of W frozen (alpha is the rank).

    rank: how many components are trained.
    dropout: of what the factors read; 0 in the paper, since it would blank a part of the model itself.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, init_lora_weights="pissa", target_modules=paths,
    )  # fmt: skip
