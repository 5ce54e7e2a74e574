"""Sparse updates at random places."""

from __future__ import annotations

from typing import Any

from ...parameters import Seed
from ..registry import adapter
from .lora import Rank, of_pair


@adapter("shira", paper="arXiv:2406.13175", size="rank", numbers=of_pair, only_linear=True)
def shira(paths: list[str], *, rank: Rank = 8, seed: Seed = 0) -> Any:
    """Some entries of each weight, drawn at random, are trained, and no others.

    rank: as many entries as low-rank updates of this rank would have numbers.
    seed: of the draw.
    """
    from peft import ShiraConfig

    return ShiraConfig(r=rank, mask_type="random", random_seed=seed, target_modules=paths)
