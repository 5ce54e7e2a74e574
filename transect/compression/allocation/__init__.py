"""Allocation: how a budget of bytes is shared out, by ranks or by shares; one file each, found by being here."""

from ...modules import import_all
from .registry import (
    Measure,
    Scores,
    allocate_ranks,
    allocation_named,
    allocations,
    is_ranking,
    needs_measure,
    ranking,
    share_out,
    sharing,
)
from .table import Ranks, RankTable, Shares, Unit, check_keep, rank_of_share, total_bytes

import_all(__name__, __path__)

__all__ = [
    "Measure", "RankTable", "Ranks", "Scores", "Shares", "Unit", "allocate_ranks", "allocation_named", "allocations",
    "check_keep", "is_ranking", "needs_measure", "rank_of_share", "ranking", "share_out", "sharing", "total_bytes",
]  # fmt: skip
