"""The same share of bytes for every matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .registry import sharing
from .table import Shares, Unit


@sharing("uniform")
def uniform(units: Sequence[Unit], keep: float, scores: Mapping[str, float]) -> Shares:
    """Let every matrix keep the same share of its bytes; for a low-rank pair, r = floor(keep m n / (m + n))."""
    return {unit.name: keep for unit in units}
