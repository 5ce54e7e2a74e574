"""Computing rows: what one process does with the model, the prepared factors and the evaluation data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy, Matrix
from ..compression import Recipe, compress_anatomy
from ..compression import method as registered
from ..compression.allocation import needs_measure
from ..compression.compress import SEARCH_SEQUENCES, choose_ranks
from ..compression.divergence import Divergence
from ..compression.frame import apply_ranks, describe_ranks, rank_table, temporarily
from ..evaluation import evaluate, matrix_bytes
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
        self._measures: dict[str, Divergence] = {}

    @property
    def matrices(self) -> list[Matrix]:
        return self.anatomy.matrices(self.plan.roles)

    def run(self, rows: Sequence[Row], on_row: Callable[[Row], None]) -> None:
        """Compute the rows that are not finished, and write each as soon as it is."""
        for row in rows:
            if finished(self.folder, row) is None:
                write_json(row_path(self.folder, row), self.compute(row))
            on_row(row)

    def compute(self, row: Row) -> dict[str, Any]:
        """One row of the table."""
        matrices = self.matrices
        with temporarily(self.anatomy, matrices):
            started = time.perf_counter()
            outcome: dict[str, Any] = {"kept": 1.0}
            if row.method is not None:
                outcome = self._compress(row, matrices)
            seconds = time.perf_counter() - started + self._preparation_seconds(row)
            measured = evaluate(self.anatomy.model, self.evaluation)
            stored = matrix_bytes(self.anatomy)
        return {
            "method": row.method or "dense", "allocation": row.allocation, "keep": row.keep, "kept": outcome["kept"],
            "matrix_bytes": stored, **measured, "compress_seconds": 0.0 if row.method is None else seconds,
        }  # fmt: skip

    def _compress(self, row: Row, matrices: list[Matrix]) -> dict[str, Any]:
        assert row.method is not None
        recipe = Recipe(
            row.method, row.keep, row.allocation, self.plan.settings.get(row.method, {}),
            sequential=self.plan.sequential and bool(registered(row.method).needs),
            refit=self.plan.refit and registered(row.method).refit,
        ).resolved(matrices)  # fmt: skip
        if recipe.sequential or recipe.refit:  # calibrated on its own compressed blocks: nothing to share
            dtype = getattr(torch, self.plan.accumulate)
            return compress_anatomy(
                self.anatomy, recipe, self.calibration, matrices=matrices, accumulate=dtype, seed=self.plan.seed,
                fisher=self.plan.fisher,  # type: ignore[arg-type]
            )  # fmt: skip
        factors = Factors(factors_path(self.folder, row.method))
        tables = [rank_table(matrix, factors[matrix.name]) for matrix in matrices]
        measure = None
        if needs_measure(row.allocation) and row.keep < 1:
            if row.method not in self._measures:
                search = list(self.calibration.take(SEARCH_SEQUENCES))
                self._measures[row.method] = Divergence(self.anatomy, matrices, dict(factors), search)
            measure = self._measures[row.method]
        ranks = choose_ranks(self.anatomy, matrices, recipe, tables, factors, self.calibration, measure)
        apply_ranks(matrices, factors, ranks)
        return describe_ranks(tables, ranks)

    def _preparation_seconds(self, row: Row) -> float:
        """What a run of this row alone would have spent before: the shared statistics pass, and its factorization."""
        if row.method is None or not factors_path(self.folder, row.method).is_file():
            return 0.0
        seconds = Factors(factors_path(self.folder, row.method)).seconds
        if registered(row.method).needs:
            path = self.folder / "statistics.json"
            seconds += json.loads(path.read_text())["seconds"]
        return seconds


def factors_path(folder: Path, method: str) -> Path:
    return folder / "factors" / f"{method}.safetensors"
