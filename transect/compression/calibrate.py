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
from ..statistics.store import KIND, LAYOUT
from ..store import alone, carries_mark
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

    What is missing there is collected in a pass of its own, and added. While another run does that, this one waits.

    batches: iterable with a `fingerprint`, see `transect.data.Batches`.
    """
    wanted = list(dict.fromkeys(wanted))
    of = KIND + json.dumps({
        "transect": __version__,
        "layout": LAYOUT,
        "model": computation_fingerprint(anatomy.model),
        "data": batches.fingerprint,
        "matrices": " ".join(matrix.name for matrix in matrices),
        "fisher": fisher,
        "accumulate": str(accumulate),
        "seed": str(seed),
    })  # fmt: skip

    def add(store: Statistics | None, missing: Sequence[Statistic]) -> Statistics:
        made = collect(
            anatomy, batches, missing, matrices, fisher=fisher, accumulate=accumulate, seed=seed, progress=progress
        )
        return made if store is None else store.merge(made)

    if cache is None:
        return add(None, wanted)
    seen = _state(cache)
    store, collected, missing = _cached(cache, of, wanted)
    if store is not None and not missing:
        return store
    with alone(cache, wait=True):
        if _state(cache) != seen:  # another run has kept what it collected
            store, collected, missing = _cached(cache, of, wanted)
            if store is not None and not missing:
                return store
        store = add(store, missing)
        try:
            store.save(cache, of, {*collected, *(statistic.label for statistic in missing)})
        except (OSError, SafetensorError) as error:
            raise TransectError(f"the statistics cannot be kept in {cache}: {error}") from error
    return store


def _cached(cache: Path, of: str, wanted: Sequence[Statistic]) -> tuple[Statistics | None, set[str], list[Statistic]]:
    """What the cache holds, the labels of what was collected into it, and what is missing there."""
    store, collected = Statistics.load(cache, of) or (None, set())
    return store, collected, [statistic for statistic in wanted if statistic.label not in collected]


def _state(cache: Path) -> tuple[int, int] | None:
    """What is another after the file has been replaced."""
    try:
        found = cache.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
