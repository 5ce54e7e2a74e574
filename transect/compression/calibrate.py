"""The statistics for one or several methods: collected in one pass, or read from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy, Matrix
from ..statistics import Fisher, Progress, Statistic, Statistics, collect
from ..version import __version__
from .fingerprint import computation_fingerprint


def calibrate(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    wanted: Iterable[Statistic],
    batches: Any,
    *,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Collect the union of the wanted statistics; with `cache` (a file) they are read from it where they fit.

    batches: iterable with a `fingerprint`, see `transect.data.Batches`.
    """
    wanted = list(dict.fromkeys(wanted))
    of = json.dumps({
        "transect": __version__,
        "model": computation_fingerprint(anatomy.model),
        "data": batches.fingerprint,
        "matrices": " ".join(matrix.name for matrix in matrices),
        "wanted": " ".join(sorted(statistic.label for statistic in wanted)),
        "fisher": fisher,
        "accumulate": str(accumulate),
        "seed": str(seed),
    })  # fmt: skip
    found = Statistics.load(cache, of) if cache else None
    if found is not None:
        return found
    store = collect(
        anatomy, batches, wanted, matrices, fisher=fisher, accumulate=accumulate, seed=seed, progress=progress
    )
    if cache:
        store.save(cache, of)
    return store
