"""What the rows of a comparison share: the statistics, and each method's factorizations. Read, or computed and kept."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy
from ..compression import method
from ..compression.calibrate import calibrate
from ..compression.frame import factorize
from ..errors import TransectError
from ..statistics import Progress, Statistics
from ..statistics.store import KIND
from ..store import carries_mark, keep_json, kept_json, remove
from .factors import Factors
from .plan import Plan, Row, factors_file

_logger = logging.getLogger(__name__)
STATISTICS, TIMED = "statistics.safetensors", "statistics.json"


def prepare(
    anatomy: Anatomy, plan: Plan, folder: Path, calibration: Any, rows: Iterable[Row], progress: Progress | None
) -> None:
    """Collect the statistics of all methods in one pass and factorize every matrix once a method; all of it on disk."""
    rows = [row for row in rows if row.method is not None]
    statistics = None
    if any(plan.recipe(row).needs for row in rows):
        statistics = calibrate_plan(anatomy, plan, folder, calibration, progress)
    for name in dict.fromkeys(row.method for row in rows if row.method is not None):
        if plan.is_factorized(name) and _kept_factors(plan, folder, name) is None:
            _make_factors(anatomy, plan, folder, name, statistics, progress)


def calibrate_plan(
    anatomy: Anatomy, plan: Plan, folder: Path, calibration: Any, progress: Progress | None = None
) -> Statistics:
    """The union of all rows' statistics, in one pass, or as it lies in the run folder; more are added to that."""
    of, started = plan.of("statistics"), time.perf_counter()
    cache = folder / STATISTICS
    timed = kept_json(folder / TIMED, of)
    if os.path.lexists(cache) and not carries_mark(cache, KIND):
        _logger.info("%s is not used, since it is damaged: it is computed anew", cache)
        remove(cache)
    if timed is None:  # what they took is known only when they are collected
        remove(cache)
    statistics = calibrate(
        anatomy, anatomy.matrices(plan.roles), plan.needs, calibration,
        fisher=plan.fisher, accumulate=getattr(torch, plan.accumulate), seed=plan.seed,  # type: ignore[arg-type]
        cache=cache, progress=progress,
    )  # fmt: skip
    before = timed or {"seconds": 0.0, "collected": []}
    collected = {*before["collected"], *(statistic.label for statistic in plan.needs)}
    if len(collected) > len(before["collected"]):
        seconds = before["seconds"] + time.perf_counter() - started
        keep_json(folder / TIMED, {"seconds": seconds, "collected": sorted(collected)}, of)
    return statistics


def calibration_seconds(plan: Plan, folder: Path) -> float:
    """What the statistics took."""
    timed = kept_json(folder / TIMED, plan.of("statistics"))
    return 0.0 if timed is None else float(timed["seconds"])


def factors_of(anatomy: Anatomy, plan: Plan, folder: Path, name: str, statistics: Statistics | None) -> Factors:
    """A method's factorizations of all matrices."""
    found = _kept_factors(plan, folder, name)
    if found is None:
        _make_factors(anatomy, plan, folder, name, statistics, None)
        found = _kept_factors(plan, folder, name)
    if found is None:
        raise TransectError(f"{folder / factors_file(name)} cannot be read back; is the disk in order?")
    return found


def _kept_factors(plan: Plan, folder: Path, name: str) -> Factors | None:
    return Factors.load(folder / factors_file(name), plan.of("factors", name))


def _make_factors(
    anatomy: Anatomy, plan: Plan, folder: Path, name: str, statistics: Statistics | None, progress: Progress | None
) -> None:
    started, chosen = time.perf_counter(), method(name)
    settings = chosen.settings(plan.settings.get(name, {}))
    factors = factorize(anatomy.matrices(plan.roles), chosen, settings, statistics, progress)
    Factors.save(folder / factors_file(name), factors, time.perf_counter() - started, plan.of("factors", name))
