"""Computing rows: what one process does with the model, the prepared factors and the evaluation data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy
from ..compression import compress_anatomy
from ..compression import method as registered
from ..compression.allocation import Scores
from ..compression.calibrate import calibrate
from ..compression.compress import outcome_of, run_compressor
from ..compression.compressors import RankCompressor
from ..compression.copying import working_copy
from ..compression.factorized import Factorized
from ..compression.frame import temporarily
from ..errors import OutOfReach
from ..evaluation import evaluate
from ..forward import at_rest
from ..statistics import Statistics
from .factors import Factors
from .plan import Plan, Row, finished, row_path, write_json


class Worker:
    """Holds the dense model and computes any row of the plan; the model is dense again after each.

    calibration, evaluation: `transect.data.Batches`.
    """

    def __init__(self, folder: Path, plan: Plan, model: Any, calibration: Any, evaluation: Any) -> None:
        self.folder, self.plan = folder, plan
        self.anatomy = Anatomy(model)
        self.calibration, self.evaluation = calibration, evaluation
        self._factorized: dict[str, Factorized] = {}
        self._scores = Scores(self.anatomy.matrices(plan.roles))  # the first row that needs some pays for them

    def run(self, rows: Sequence[Row], on_row: Callable[[Row], None]) -> None:
        """Compute the rows that are not finished, and write each as soon as it is."""
        for row in rows:
            if finished(self.folder, row) is None:
                write_json(row_path(self.folder, row), self.compute(row))
            on_row(row)

    def compute(self, row: Row) -> dict[str, Any]:
        """One row of the table; a budget that is out of the method's reach has a note instead of numbers."""
        described = {"method": row.method or "dense", "allocation": row.allocation, "keep": row.keep}
        with at_rest(self.anatomy.model):
            try:
                if row.method is None:
                    return described | self._evaluated(self.anatomy, 1.0, 0.0)
                if factors_path(self.folder, row.method).is_file():
                    return described | self._truncated(row)
                return described | self._compressed(row)
            except OutOfReach as reason:
                return described | {"note": str(reason)}

    def _evaluated(self, anatomy: Anatomy, kept: float, seconds: float) -> dict[str, Any]:
        measured = evaluate(anatomy.model, self.evaluation)
        return {
            "kept": kept, "matrix_bytes": anatomy.matrix_bytes(), **measured, "compress_seconds": seconds,
        }  # fmt: skip

    def _truncated(self, row: Row) -> dict[str, Any]:
        """A row of a method whose matrices have been factorized: nothing is left but to choose the ranks."""
        assert row.method is not None
        matrices = self.anatomy.matrices(self.plan.roles)
        roles = {matrix.role for matrix in matrices}
        recipe = self.plan.recipe(row).resolved(self.anatomy, matrices)
        dense_bytes = self.anatomy.matrix_bytes(roles)
        with temporarily(self.anatomy, matrices):
            started = time.perf_counter()
            factorized = self._factorized.get(row.method)
            if factorized is None:
                factors = Factors(factors_path(self.folder, row.method))
                factorized = Factorized(self.anatomy, matrices, factors, self.calibration, self._scores)
                self._factorized = {row.method: factorized}  # one method's at a time
            statistics = self.statistics if recipe.needs else None
            ranks = factorized.ranks(row.allocation, row.keep, recipe.allocation_settings, statistics)
            compressor = RankCompressor(recipe.registered, recipe.settings, ranks, factorized.factors)
            run_compressor(self.anatomy, matrices, recipe, compressor, statistics, self.calibration)
            seconds = time.perf_counter() - started + self._preparation_seconds(row)
            return self._evaluated(self.anatomy, outcome_of(self.anatomy, roles, dense_bytes)["kept"], seconds)

    def _compressed(self, row: Row) -> dict[str, Any]:
        """A row that is computed on its own, on a copy of the model, from the shared statistics."""
        recipe = self.plan.recipe(row)
        anatomy = working_copy(self.anatomy)
        statistics = self.statistics if recipe.needs else None
        started = time.perf_counter()
        outcome = compress_anatomy(
            anatomy, recipe, self.calibration, matrices=anatomy.matrices(self.plan.roles), statistics=statistics,
            scores=self._scores, accumulate=getattr(torch, self.plan.accumulate), seed=self.plan.seed,
            fisher=self.plan.fisher,  # type: ignore[arg-type]
        )  # fmt: skip
        seconds = time.perf_counter() - started + self._preparation_seconds(row)
        return self._evaluated(anatomy, outcome["kept"], seconds)

    @cached_property
    def statistics(self) -> Statistics:
        """What all rows of the plan need, from the run folder."""
        return calibrate_plan(self.anatomy, self.plan, self.folder, self.calibration)

    def _preparation_seconds(self, row: Row) -> float:
        """What a run of this row alone would have spent before: the shared statistics pass, and its factorization."""
        assert row.method is not None
        seconds = 0.0
        if factors_path(self.folder, row.method).is_file():
            seconds += Factors(factors_path(self.folder, row.method)).seconds
        timed = self.folder / "statistics.json"
        if registered(row.method).needs and timed.is_file():
            seconds += json.loads(timed.read_text())["seconds"]
        return seconds


def calibrate_plan(anatomy: Anatomy, plan: Plan, folder: Path, calibration: Any, progress: Any = None) -> Statistics:
    """The union of all rows' statistics, in one pass, or as it lies in the run folder."""
    cache, started = folder / "statistics.safetensors", time.perf_counter()
    known = cache.is_file()
    statistics = calibrate(
        anatomy, anatomy.matrices(plan.roles), plan.needs, calibration,
        fisher=plan.fisher, accumulate=getattr(torch, plan.accumulate), seed=plan.seed,  # type: ignore[arg-type]
        cache=cache, progress=progress,
    )  # fmt: skip
    if not known:
        write_json(folder / "statistics.json", {"seconds": time.perf_counter() - started})
    return statistics


def factors_path(folder: Path, method: str) -> Path:
    """Where a method's factorizations lie in the run folder."""
    return folder / "factors" / f"{method}.safetensors"
