"""Comparing two by pairs: of trainings with the same seed, data and order, or of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class OverSeeds:
    """The mean of differences of losses, one of each seed, and its standard error over seeds (0 of a single one)."""

    mean: float
    error: float

    @property
    def lower(self) -> bool:
        """Whether the loss is lower by more than chance would make it: two standard errors."""
        return self.mean < -2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


def over_seeds(differences: Sequence[float]) -> OverSeeds:
    """Of trainings from the same seeds, in pairs."""
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return OverSeeds(mean(differences), error)


def paired(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """By how much the first are larger at the mean, and the standard error of that over the pairs (0 for one)."""
    found = over_seeds([one - other for one, other in zip(ones, others, strict=True)])
    return found.mean, found.error
