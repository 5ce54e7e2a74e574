"""What all trainings of one repair have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..forward import Batch
from ..training import Run
from .settings import Settings


@dataclass(frozen=True)
class Job:
    """settings: resolved. training, held_out: this process's share of every batch; None where it has no part of one.

    tokens: positions of each whole training batch.
    """

    settings: Settings
    run: Run
    training: Sequence[Batch | None]
    held_out: Sequence[Batch | None]
    tokens: Sequence[int]
