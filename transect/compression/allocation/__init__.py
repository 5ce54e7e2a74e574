"""Rank allocation: how many ranks each matrix gets within a budget of bytes."""

from . import global_ranking, ilp, uniform  # noqa: F401 - importing an allocation registers it
from .registry import Measure, allocate, allocation, allocation_named, allocations, needs_measure
from .table import Ranks, RankTable, check_keep, total_bytes

__all__ = [
    "Measure", "RankTable", "Ranks", "allocate", "allocation", "allocation_named", "allocations", "check_keep",
    "needs_measure", "total_bytes",
]  # fmt: skip
