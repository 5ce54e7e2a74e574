"""Computing rows: what one process does with the model, the prepared factors and the evaluation data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy
from ..compression import Recipe, compress_anatomy
from ..compression import method as registered
from ..compression.allocation import Scores
from ..compression.compress import make_compressor, outcome_of, run_compressor
from ..compression.compressors import Compressor, RankCompressor
from ..compression.copying import working_copy
from ..compression.factorized import Factorized
from ..compression.fingerprint import computation_fingerprint, model_fingerprint
from ..compression.frame import temporarily
from ..compression.registry import Calibration
from ..errors import OutOfReach, TransectError
from ..evaluation import evaluate, evaluate_loss, model_bytes, operations_of, quality_of
from ..forward import at_rest, with_states_of
from ..statistics import Statistics
from ..store import keep_json
from .beside import opened_beside
from .factors import Factors
from .knowledge import Knowledge
from .plan import Plan, Row
from .prepared import calibrate_plan, calibration_seconds, factors_of


class Worker:
    """Holds the dense model and computes any row of the plan; the model is dense again after each.

    calibration, evaluation: `transect.data.Batches`. also: further texts that each row is judged on, by name.
    knowledge: what each row is asked, if anything.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        model: Any,
        calibration: Any,
        evaluation: Any,
        knowledge: Knowledge | None = None,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.plan, self.knowledge = folder, plan, knowledge
        self.anatomy = Anatomy(model)
        self.calibration = calibration
        self.evaluation = with_states_of(model, evaluation)
        self.also = {name: with_states_of(model, text) for name, text in (also or {}).items()}
        self._factorized: dict[str, tuple[Factorized, Factors]] = {}
        self._prepared: dict[str, tuple[Any, float]] = {}  # and what it took, in seconds; of one method at a time
        self._replaced: tuple[Compressor, dict[str, Any]] | None = None  # of the last row, and what was measured
        self._scores = Scores(self.anatomy.matrices(plan.roles))  # the first row that needs some pays for them

    def run(self, rows: Sequence[Row], on_row: Callable[[Row], None]) -> None:
        """Compute the rows, and write each as soon as it is there."""
        for row in rows:
            keep_json(self.folder / row.file, self.compute(row), self.plan.of_row(row))
            on_row(row)

    def compute(self, row: Row) -> dict[str, Any]:
        """One row of the table; a budget that is out of the method's reach has a note instead of numbers."""
        if row.beside:
            return self._beside(row)
        described = {"method": row.method or "dense", "allocation": row.allocation, "keep": row.keep}
        with at_rest(self.anatomy.model):
            try:
                if row.method is None:
                    return described | self._evaluated(self.anatomy, 1.0, 0.0, dense=True)
                if self.plan.is_factorized(row.method):
                    return described | self._truncated(row)
                return described | self._compressed(row)
            except OutOfReach as reason:
                return described | {"note": str(reason)}

    def _evaluated(self, anatomy: Anatomy, kept: float, seconds: float, dense: bool = False) -> dict[str, Any]:
        measured = evaluate(anatomy.model, self.evaluation)
        known: dict[str, Any] = {}
        if self.knowledge is not None:
            known["facts"] = 1.0 if dense else self.knowledge.share(anatomy)
        if self.also:
            known["also"] = {name: evaluate_loss(anatomy.model, also).to_row() for name, also in self.also.items()}
        if self.plan.lengths:
            known["lengths"] = [asdict(one) for one in quality_of(anatomy.model, self.plan.lengths)]
        return {
            "kept": kept, "matrix_bytes": anatomy.matrix_bytes(), **measured, **asdict(operations_of(anatomy.model)),
            **known, "compress_seconds": seconds,
        }  # fmt: skip

    def _beside(self, row: Row) -> dict[str, Any]:
        """The row of a finished model. What it is larger or smaller by counts as of the matrices that a budget counts.

        So `kept` is comparable, and of a compressed model what it was, but for what has no matrix of its own: tables,
        gates, norms.
        """
        chosen, dense = self.plan.beside[row.beside], self.anatomy
        finished = opened_beside(chosen.source, self.plan.dtype, self.plan.device)
        if computation_fingerprint(finished.model) != chosen.computation:
            raise TransectError(f"{chosen.source} has changed since the comparison began; begin it anew")
        roles = {matrix.role for matrix in dense.matrices(self.plan.roles)}
        counted = dense.matrix_bytes(roles)
        kept = 1 + (model_bytes(finished.model) - model_bytes(dense.model)) / counted
        with at_rest(finished.model):
            measured = self._evaluated(Anatomy(finished.model), kept, 0.0)
        done = f" ({chosen.done})" if chosen.done and chosen.done != row.beside else ""
        return {"method": f"{row.beside}{done}", "allocation": "-", "keep": None, **measured, "compress_seconds": None}

    def _truncated(self, row: Row) -> dict[str, Any]:
        """A row of a method whose matrices have been factorized: nothing is left but to choose the ranks."""
        assert row.method is not None
        matrices = self.anatomy.matrices(self.plan.roles)
        roles = {matrix.role for matrix in matrices}
        recipe = self.plan.recipe(row).resolved(self.anatomy, matrices)
        dense_bytes = self.anatomy.matrix_bytes(roles)
        statistics = self.statistics if recipe.needs else None
        with temporarily(self.anatomy, matrices):
            if row.method not in self._factorized:
                factors = factors_of(self.anatomy, self.plan, self.folder, row.method, statistics)
                factorized = Factorized(self.anatomy, matrices, factors, self.calibration, self._scores)
                self._factorized = {row.method: (factorized, factors)}  # one method's at a time
            started = time.perf_counter()
            factorized, factors = self._factorized[row.method]
            ranks = factorized.ranks(row.allocation, recipe.structure_keep, recipe.allocation_settings, statistics)
            compressor = RankCompressor(recipe.registered, recipe.settings, ranks, factorized.factors)
            run_compressor(self.anatomy, matrices, recipe, compressor, statistics, self.calibration)
            seconds = time.perf_counter() - started + factors.seconds + self._calibration_seconds(row)
            return self._evaluated(self.anatomy, outcome_of(self.anatomy, roles, dense_bytes)["kept"], seconds)

    def _compressed(self, row: Row) -> dict[str, Any]:
        """A row that is computed on its own, on a copy of the model, from the shared statistics."""
        recipe = self.plan.recipe(row)
        statistics = self.statistics if recipe.needs else None
        replacing = self._replacing(recipe, statistics)
        if replacing is not None and self._replaced is not None and self._replaced[0] == replacing:
            return self._replaced[1]  # several budgets may pay for the same sizes
        anatomy = working_copy(self.anatomy)
        prepared, preparing = self._prepared_for(recipe, statistics)
        started = time.perf_counter()
        outcome = compress_anatomy(
            anatomy, recipe, self.calibration, matrices=anatomy.matrices(self.plan.roles), statistics=statistics,
            scores=self._scores, prepared=prepared, accumulate=getattr(torch, self.plan.accumulate),
            seed=self.plan.seed, fisher=self.plan.fisher,  # type: ignore[arg-type]
        )  # fmt: skip
        seconds = time.perf_counter() - started + preparing + self._calibration_seconds(row)
        measured = self._evaluated(anatomy, outcome["kept"], seconds)
        if replacing is not None:
            self._replaced = replacing, measured
        return measured

    def _replacing(self, recipe: Recipe, statistics: Statistics | None) -> Compressor | None:
        """What is done to each matrix, of a recipe that gives each a size; None for any other."""
        if recipe.registered.family != "replacement" or recipe.keep == 1:
            return None
        matrices = self.anatomy.matrices(self.plan.roles)
        recipe = recipe.resolved(self.anatomy, matrices)
        return make_compressor(self.anatomy, matrices, recipe, statistics, self.calibration, None, self._scores)

    def _prepared_for(self, recipe: Recipe, statistics: Statistics | None) -> tuple[Any, float]:
        """What the method does once for all budgets, and the seconds that it took; None if there is no such thing."""
        chosen = recipe.registered
        if chosen.prepare is None or recipe.keep == 1:
            return None, 0.0
        if recipe.method not in self._prepared:
            recipe = recipe.resolved(self.anatomy, self.anatomy.matrices())  # OutOfReach before anything is prepared
            started = time.perf_counter()
            shared = Calibration(statistics, self.calibration, self.plan.seed)
            made = chosen.prepare(self.anatomy, shared, **recipe.settings)
            self._prepared = {recipe.method: (made, time.perf_counter() - started)}
        return self._prepared[recipe.method]

    @cached_property
    def statistics(self) -> Statistics:
        """What all rows of the plan need, from the run folder."""
        return calibrate_plan(self.anatomy, self.plan, self.folder, self.calibration)

    def _calibration_seconds(self, row: Row) -> float:
        """What a run of this row alone would have spent on the shared statistics pass."""
        assert row.method is not None
        return calibration_seconds(self.plan, self.folder) if registered(row.method).collects else 0.0


def load_worker(folder: Path, plan: Plan, knowledge: Knowledge | None = None) -> Worker:
    """A worker in a fresh process: the model from its folder or hub name, the data from the run folder.

    Raises TransectError if they are not those of the plan.
    """
    from ..checkpoint import open_model
    from ..data import Batches

    opened = open_model(plan.model, dtype=plan.dtype, device=plan.device, architecture=plan.architecture)
    if model_fingerprint(opened.model) != plan.weights:
        raise TransectError(
            f"{plan.model} holds other weights than the model that is compared, so that other processes cannot load "
            "it: save the model first and name its folder, or use one process (workers=1, --workers 1)"
        )
    calibration = Batches.load(folder / "calibration.safetensors", plan.calibration)
    evaluation = Batches.load(folder / "evaluation.safetensors", plan.evaluation)
    also = {name: Batches.load(folder / also_file(of), of) for name, of in plan.also.items()}
    return Worker(folder, plan, opened.model, calibration, evaluation, knowledge, also)


def also_file(fingerprint: str) -> str:
    """Where a further text lies in the run folder."""
    return f"evaluation-{fingerprint}.safetensors"
