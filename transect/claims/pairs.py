"""Comparing two by pairs: of trainings with the same seed, data and order, or of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev


def paired(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """By how much the first are larger at the mean, and the standard error of that over the pairs (0 for one)."""
    each = [one - other for one, other in zip(ones, others, strict=True)]
    return mean(each), stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
