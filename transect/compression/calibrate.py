"""The statistics for one or several methods: collected in one pass, or read from the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..anatomy import Anatomy, Matrix
from ..errors import TransectError
from ..statistics import Fisher, Progress, Statistic, Statistics, collect
from ..statistics.store import KIND
from ..store import carries_mark
from ..version import __version__
from .fingerprint import computation_fingerprint


def check_cache(cache: Path) -> None:
    """Raise TransectError, before any work, unless the file may be written: it is not there, empty, or one of ours."""
    if not cache.parent.is_dir():
        raise TransectError(f"the statistics cannot be kept in {cache}: there is no folder {cache.parent}")
    if os.path.lexists(cache) and not carries_mark(cache, KIND):
        raise TransectError(
            f"{cache} is there and holds no statistics that Transect kept; move it away, or name another file as cache"
        )


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

    What is missing there is collected in a pass of its own, and added.

    batches: iterable with a `fingerprint`, see `transect.data.Batches`.
    """
    wanted = list(dict.fromkeys(wanted))
    of = KIND + json.dumps({
        "transect": __version__,
        "model": computation_fingerprint(anatomy.model),
        "data": batches.fingerprint,
        "matrices": " ".join(matrix.name for matrix in matrices),
        "fisher": fisher,
        "accumulate": str(accumulate),
        "seed": str(seed),
    })  # fmt: skip
    found = Statistics.load(cache, of) if cache else None
    store, collected = found or (None, set())
    missing = [statistic for statistic in wanted if statistic.label not in collected]
    if store is not None and not missing:
        return store
    made = collect(
        anatomy, batches, missing, matrices, fisher=fisher, accumulate=accumulate, seed=seed, progress=progress
    )
    store = made if store is None else store.merge(made)
    if cache:
        try:
            store.save(cache, of, {*collected, *(statistic.label for statistic in missing)})
        except (OSError, SafetensorError) as error:
            raise TransectError(f"the statistics cannot be kept in {cache}: {error}") from error
    return store
