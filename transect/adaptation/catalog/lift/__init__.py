"""LIFT: fine-tuning of the largest entries of a low-rank approximation (Liu et al., ICML 2025, arXiv:2506.00772)."""

from __future__ import annotations

from typing import Annotated, Any

from ....parameters import Seed
from ...registry import Range, adapter
from .masks import Select, budget
from .tuner import LiftConfig, LiftModel, RefreshMasks

__all__ = ["LiftConfig", "LiftModel", "RefreshMasks", "lift"]

Rank = Annotated[int, Range(1, 2**20)]


@adapter("lift", paper="arXiv:2506.00772", size="rank", numbers=budget, rate=2e-4)
def lift(
    paths: list[str], *, rank: Rank = 8, filter_rank: Rank = 32, interval: Annotated[int, Range(0, 2**31)] = 400,
    select: Select = "lift", seed: Seed = 0,
) -> Any:  # fmt: skip
    """The entries of each weight are trained that are largest in its low-rank approximation, and no others.

    The optimizer holds numbers for these alone, in float32. Published runs have Adam's betas 0.9 and 0.95, eps 1e-6,
    a rate of 2e-4 and no weight decay (which would pull the entries to where they began).

    rank: as many entries as low-rank updates of this rank would have numbers.
    filter_rank: of the approximation.
    interval: steps after which the entries are chosen anew from the weights as they are then; 0 for never.
    select: which entries: `lift`, or, to compare, the largest of the weight itself or some drawn at random.
    seed: of the draw.
    """
    return LiftConfig(
        rank=rank, filter_rank=filter_rank, interval=interval, select=select, seed=seed, target_modules=paths,
    )  # fmt: skip
