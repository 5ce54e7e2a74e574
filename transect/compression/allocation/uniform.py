"""The same share of bytes for every matrix."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import Measure, allocation
from .table import Ranks, RankTable, uniform_rank


@allocation("uniform")
def uniform(tables: Sequence[RankTable], keep: float, measure: Measure | None) -> Ranks:
    """Give every matrix the rank at which it keeps the same share of its bytes: r = floor(keep m n / (m + n))."""
    return {table.name: None if keep == 1 else uniform_rank(table.shape, keep) for table in tables}
