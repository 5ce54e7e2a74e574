"""A comparison with one block in memory at a time: all that is known of a block lies on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from ..anatomy import Anatomy
from ..compression import Recipe, method
from ..compression.allocation import RankTable, allocation_named, is_ranking
from ..compression.compress import outcome_of
from ..data import Batches
from ..errors import OutOfReach
from ..evaluation import evaluate_loss, model_bytes, parameters, peak_memory
from ..forward import Batch, at_rest, computing_wide
from ..forward.blocks import Feed, put_out, run_block
from ..statistics import Progress
from ..store import Folder, keep_json, kept_json
from ..streaming import StreamedModel
from ..streaming.passes import backward_pass, forward_pass
from ..streaming.plan import (
    choice_of,
    compress_block,
    factorize_blocks,
    feeds_of_source,
    planned_compressor,
    priced_blocks,
    ranks_of,
    score_blocks,
    shown,
)
from ..streaming.workspace import Workspace
from .compare import check_plan, table, take_folder
from .estimate import estimate_size
from .plan import Plan, Row
from .prepared import TIMED

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none

_logger = logging.getLogger(__name__)
BLOCKS = "blocks"  # the folder of what lies on disk by block, inside the run folder


def compare_streamed(
    open_source: Callable[[], StreamedModel],
    plan: Plan,
    folder: Folder,
    calibration: Any,
    evaluation: Any,
    *,
    also: Mapping[str, Batches] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> pd.DataFrame:
    """Compute all rows of the plan into `folder` and return the table; see `compare_anatomy`.

    open_source: gives the model with empty blocks; each row changes one of its own. In memory are one block with its
    statistics and factors, what lies outside the blocks, and the residual streams of the calibration and held-out data.
    Speeds are not measured, since no model is ever whole. Methods whose statistics differ from those of an earlier run
    in the same folder make the passes over the calibration data begin anew.
    """
    source = open_source()
    check_plan(source.anatomy, plan, streamed=True)
    take_folder(folder, plan, overwrite)
    waiting = []
    for row in dict.fromkeys(plan.rows):
        if plan.finished(folder.path, row) is None:
            waiting.append(row)
        else:
            on_row(row)
    if waiting:
        texts = {"": evaluation, **(also or {})}
        judging = [batch for batches in texts.values() for batch in batches]
        size = estimate_size(source.anatomy, plan, calibration, judging, streamed=True)
        _logger.info("this comparison needs %s", size)
        for name in [TIMED, *(row.file for row in waiting)]:
            folder.file(name)
        worker = _StreamedWorker(open_source, source, plan, folder.path, calibration, texts, progress)
        worker.prepare()
        for row in waiting:
            keep_json(folder.path / row.file, worker.compute(row), plan.of_row(row))
            on_row(row)
    return table(plan, folder.path, {})


class _StreamedWorker:
    def __init__(
        self,
        open_source: Callable[[], StreamedModel],
        source: StreamedModel,
        plan: Plan,
        folder: Path,
        calibration: Any,
        texts: Mapping[str, Batches],
        progress: Progress | None,
    ) -> None:
        self.open_source, self.source, self.plan, self.folder = open_source, source, plan, folder
        self.calibration, self.texts, self.progress = calibration, texts, progress
        self.accumulate = getattr(torch, plan.accumulate)
        labels = sorted(statistic.label for statistic in plan.needs)
        self.work = Workspace(folder / BLOCKS, plan.of("blocks", *labels), "what a comparison keeps of each block")
        self._tables: dict[str, tuple[list[RankTable], float]] = {}
        self._options: dict[str, tuple[list[list[Any]], float]] = {}
        self._scores: dict[str, dict[str, float]] = {}

    def prepare(self) -> None:
        """Collect the statistics of all methods, block by block, on disk; an interrupted pass goes on."""
        self.work.begin()
        started, before = time.perf_counter(), self.seconds_of_statistics
        source, plan = self.source, self.plan
        gradients = [s for s in plan.needs if s.needs in ("gradient", "both")]
        inputs = [s for s in plan.needs if s not in gradients]
        blocks = len(source.anatomy.blocks)
        if not plan.needs or self.work.done("backward" if gradients else "forward") == blocks:
            return
        with at_rest(source.model):
            feeds = feeds_of_source(source, self.calibration)
            forward_pass(source, feeds, inputs, self.work, self.accumulate, bool(gradients), self.progress)
            if gradients:
                fisher: Any = plan.fisher
                backward_pass(source, feeds, gradients, self.work, self.accumulate, fisher, plan.seed, self.progress)
        keep_json(self.folder / TIMED, {"seconds": before + time.perf_counter() - started}, self.timed_of)
        self.__dict__.pop("seconds_of_statistics", None)

    @property
    def timed_of(self) -> str:
        return self.plan.of("streamed statistics", *sorted(statistic.label for statistic in self.plan.needs))

    @cached_property
    def seconds_of_statistics(self) -> float:
        """What the passes took so far, but for one that was killed."""
        timed = kept_json(self.folder / TIMED, self.timed_of)
        return 0.0 if timed is None else float(timed["seconds"])

    def compute(self, row: Row) -> dict[str, Any]:
        """One row of the table; a budget that is out of the method's reach has a note instead of numbers."""
        described = {"method": row.method or "dense", "allocation": row.allocation, "keep": row.keep}
        source = self.open_source()
        try:
            with at_rest(source.model):
                return described | self._computed(source, row)
        except OutOfReach as reason:
            return described | {"note": str(reason)}

    def _computed(self, source: StreamedModel, row: Row) -> dict[str, Any]:
        anatomy = source.anatomy
        dense_bytes = anatomy.matrix_bytes()
        recipe, compressor, kind, seconds = None, None, "", 0.0
        if row.method is not None:
            recipe = self.plan.recipe(row).resolved(anatomy, anatomy.matrices())
            kind = _kind(row.method)
            planned, seconds = self._planned(recipe)
            compressor = planned_compressor(source, recipe, planned)
        texts, calibration = {name: feeds_of_source(source, batches) for name, batches in self.texts.items()}, []
        feeds = [feed for each in texts.values() for feed in each]
        if recipe is not None and recipe.sequential:
            calibration = feeds_of_source(source, self.calibration)
        for block in shown(source, str(row), self.progress):
            with source.block(block.index) as module, torch.no_grad():
                if recipe is not None and compressor is not None and recipe.keep < 1:
                    started = time.perf_counter()
                    compress_block(block, recipe, compressor, calibration, self.work, self.accumulate, kind)
                    seconds += time.perf_counter() - started
                with computing_wide(module):
                    for item in (*feeds, *calibration):
                        item.hidden = run_block(module, item.hidden, item.calls[block.index])
        return self._measured(anatomy, texts, dense_bytes, seconds)

    def _planned(self, recipe: Recipe) -> tuple[dict[str, Any], float]:
        """Ranks, options or scores of the dense model's matrices, and the seconds that the row would have spent on them
        and before.
        """
        chosen, seconds = recipe.registered, self.seconds_of_statistics if recipe.registered.collects else 0.0
        if chosen.by_block is not None:
            if recipe.method not in self._options:
                started = time.perf_counter()
                options = priced_blocks(self.source, recipe, self.work, self.progress)
                self._options[recipe.method] = options, time.perf_counter() - started
            options, pricing = self._options[recipe.method]
            return choice_of(self.source, recipe, options), seconds + pricing
        ranking = is_ranking(recipe.allocation)
        if ranking or self.plan.is_factorized(recipe.method):
            if recipe.method not in self._tables:
                started = time.perf_counter()
                tables = factorize_blocks(
                    self.source, chosen, recipe.settings, self.work, _kind(recipe.method), self.progress
                )
                self._tables[recipe.method] = tables, time.perf_counter() - started
            tables, factorizing = self._tables[recipe.method]
            seconds += factorizing
            if ranking:
                return ranks_of(recipe, tables), seconds
        if allocation_named(recipe.allocation).plan is None:  # it goes by no scores
            return {}, seconds
        if recipe.allocation not in self._scores:
            self._scores[recipe.allocation] = score_blocks(self.source, recipe, self.work, None)
        return self._scores[recipe.allocation], seconds

    def _measured(
        self, anatomy: Anatomy, texts: Mapping[str, list[Feed]], dense_bytes: int, seconds: float
    ) -> dict[str, Any]:
        def batches(text: str) -> Iterator[Batch]:
            for item in texts[text]:
                with put_out(anatomy, item.hidden):
                    yield item.batch

        model, outcome = anatomy.model, outcome_of(anatomy, None, dense_bytes)
        scores = evaluate_loss(model, batches(""))
        also = {name: evaluate_loss(model, batches(name)).to_row() for name in texts if name}
        return {
            "kept": outcome["kept"], "matrix_bytes": outcome["matrix_bytes"], **scores.to_row(),
            "perplexity": scores.perplexity, "accuracy": scores.accuracy, "tokens": scores.tokens,
            "parameters": parameters(model), "bytes": model_bytes(model), "prefill_tokens_per_second": None,
            "decode_tokens_per_second": None, "peak_memory": peak_memory(model.device), "seconds": scores.seconds,
            "compress_seconds": seconds, **({"also": also} if also else {}),
        }  # fmt: skip


def _kind(name: str) -> str:
    """Under which name a method's factorizations lie on disk."""
    return f"factors-{quote(method(name).name, safe='')}"
