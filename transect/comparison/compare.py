"""Many compressions of one model, side by side: one statistics pass, one factorization a method, one row a budget."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..anatomy import Anatomy
from ..checkpoint import save
from ..compression import method
from ..compression.frame import factorize
from ..errors import OutOfReach, TransectError
from ..statistics import Progress
from .engines import Engine, run_here, run_in_processes, run_on_ray
from .factors import save_factors
from .plan import Plan, Row, finished
from .worker import Worker, calibrate_plan, factors_path


def compare_anatomy(
    anatomy: Anatomy,
    plan: Plan,
    folder: Path,
    calibration: Any,
    evaluation: Any,
    *,
    workers: int = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> pd.DataFrame:
    """Compute all rows of the plan into `folder` and return the table.

    A folder that holds a run of the same model, data and settings is continued: its rows, statistics and
    factorizations are kept, whichever methods and budgets they were for. A folder with another run is replaced only
    with `overwrite`, and one that holds anything else is always refused.
    """
    check_plan(anatomy, plan)
    _take_folder(folder, plan, overwrite)
    if engine == "ray" or workers > 1:
        plan = _for_other_processes(anatomy, plan, folder, calibration, evaluation)
    waiting = [row for row in plan.rows if finished(folder, row) is None]
    for row in plan.rows:
        if row not in waiting:
            on_row(row)
    prepare(anatomy, plan, folder, calibration, waiting, progress)
    groups = plan.groups(waiting)
    if engine == "ray":
        run_on_ray(folder, plan, groups, max(workers, 1), on_row)
    elif workers > 1:
        run_in_processes(folder, plan, groups, workers, on_row)
    else:
        run_here(Worker(folder, plan, anatomy.model, calibration, evaluation), groups, on_row)
    return table(plan, folder)


def check_plan(anatomy: Anatomy, plan: Plan) -> None:
    """Raise an error, before any work, if a row cannot be computed, or a budget is out of every method's reach."""
    matrices = anatomy.matrices(plan.roles)
    known = {*plan.methods, *(row.allocation for row in plan.rows)}
    for name in set(plan.settings) - known:
        raise TransectError(f"parameters are given for {name!r}, which is not compared")
    reached: dict[float, OutOfReach | None] = {}  # why a budget is out of reach, or None
    for row in plan.rows:
        if row.method is None:
            continue
        try:
            plan.recipe(row).resolved(anatomy, matrices)
            reached[row.keep] = None
        except OutOfReach as error:
            reached.setdefault(row.keep, error)
    for reason in reached.values():
        if reason is not None:
            raise reason
    anatomy.check_finite()


def prepare(
    anatomy: Anatomy, plan: Plan, folder: Path, calibration: Any, rows: Iterable[Row], progress: Progress | None
) -> None:
    """Collect the statistics of all methods in one pass and factorize every matrix once a method; all of it on disk."""
    rows = [row for row in rows if row.method is not None]
    missing = [
        name
        for name in dict.fromkeys(row.method for row in rows)
        if name is not None
        and method(name).family == "factorization"
        and not factors_path(folder, name).is_file()
        and not (plan.sequential and method(name).needs)  # such a row calibrates and factorizes on its own
    ]
    statistics = None
    if any(plan.recipe(row).needs for row in rows):
        statistics = calibrate_plan(anatomy, plan, folder, calibration, progress)
    matrices = anatomy.matrices(plan.roles)
    for name in missing:
        started = time.perf_counter()
        chosen = method(name)
        settings = chosen.settings(plan.settings.get(name, {}))
        factors = factorize(matrices, chosen, settings, statistics, progress)
        save_factors(factors_path(folder, name), factors, time.perf_counter() - started)


def table(plan: Plan, folder: Path) -> pd.DataFrame:
    """The finished rows of the plan, in its order."""
    found = [finished(folder, row) for row in plan.rows]
    return pd.DataFrame([row for row in found if row is not None])


def _take_folder(folder: Path, plan: Plan, overwrite: bool) -> None:
    before = Plan.load(folder)
    if before is None and folder.exists() and any(folder.iterdir()):
        raise TransectError(f"the folder {folder} exists and holds something that is not a comparison; choose another")
    if before is not None and before.fingerprint != plan.fingerprint:
        if not overwrite:
            raise TransectError(
                f"the folder {folder} holds a run with another model, data or settings; pass overwrite=True "
                "(--overwrite) to replace it, or choose another folder"
            )
        shutil.rmtree(folder)
    for part in ("rows", "factors"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    plan.save(folder)


def _for_other_processes(anatomy: Anatomy, plan: Plan, folder: Path, calibration: Any, evaluation: Any) -> Plan:
    """Put the data, and a model that exists only in memory, where other processes find them."""
    calibration.save(folder / "calibration.safetensors")
    evaluation.save(folder / "evaluation.safetensors")
    if not plan.model:
        if not (folder / "dense").is_dir():
            save(anatomy.model, folder / "dense")
        plan = replace(plan, model=str(folder / "dense"))
    return plan
