"""Many compressions of one model, side by side: one statistics pass, one factorization a method, one row a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..anatomy import Anatomy
from ..checkpoint import save
from ..compression import method
from ..data import Batches, Fact
from ..errors import OutOfReach, TransectError
from ..evaluation import check_lengths, standard_error
from ..forward import Batch, task_of
from ..pool import Engine, run_in_processes, run_on_ray
from ..statistics import Progress
from ..store import Folder
from ..streaming.plan import check_streams
from .estimate import estimate_size
from .knowledge import knowledge_of
from .plan import RUN, Plan, Row, factors_file
from .prepared import STATISTICS, TIMED, prepare
from .worker import Worker, also_file, load_worker

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none

_logger = logging.getLogger(__name__)


def compare_anatomy(
    anatomy: Anatomy,
    plan: Plan,
    folder: Folder,
    calibration: Any,
    evaluation: Any,
    *,
    also: Mapping[str, Batches] | None = None,
    facts: Sequence[Fact] = (),
    tokenizer: Any = None,
    workers: int = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> pd.DataFrame:
    """Compute all rows of the plan into `folder` and return the table.

    A folder that holds a run of the same model, data and settings is continued: its rows, statistics and
    factorizations are kept, whichever methods and budgets they were for. A folder with another run is replaced only
    with `overwrite`, but for what others have put there, and one that holds anything else is always refused.
    also: each row is judged on these texts, too, by name.
    plan.lengths: each row is also measured at prompts of these lengths (see `transect.evaluation.quality_of`).
    facts: each row has the share, of those that the dense model says by itself, that it says too. How many these are
    is in the table's `attrs["facts"]`, {"known", "asked"}. TransectError if there are none.
    A row that was lost with its process, twice, has a note in the table and is named in the table's `attrs["lost"]`.
    """
    check_plan(anatomy, plan)
    take_folder(folder, plan, overwrite)
    done = {row for row in plan.rows if plan.finished(folder.path, row) is not None}
    waiting = [row for row in dict.fromkeys(plan.rows) if row not in done]
    for row in plan.rows:
        if row in done:
            on_row(row)
    knowledge = knowledge_of(anatomy, plan, folder, facts, tokenizer) if facts else None
    lost: dict[Row, str] = {}
    if waiting:
        size = estimate_size(anatomy, plan, calibration, [*evaluation, *_all_of(also)], streamed=False)
        _logger.info("this comparison needs %s; with --stream the memory is that of one block", size)
        for name in [STATISTICS, TIMED, *(row.file for row in waiting), *map(factors_file, plan.methods)]:
            folder.file(name)
        prepare(anatomy, plan, folder.path, calibration, waiting, progress)
        groups = plan.groups(waiting)
        if engine == "ray" or workers > 1:
            plan = _for_other_processes(anatomy, plan, folder, calibration, evaluation, also or {})
            run = run_on_ray if engine == "ray" else run_in_processes
            load = partial(load_worker, folder.path.resolve(), plan, knowledge)
            lost = run(load, groups, workers, on_row, lambda row: plan.finished(folder.path, row) is not None)
        else:
            worker = Worker(folder.path, plan, anatomy.model, calibration, evaluation, knowledge, also)
            for rows in groups:
                worker.run(rows, on_row)
    frame = table(plan, folder.path, lost)
    frame.attrs["task"] = task_of(anatomy.model)
    if knowledge is not None:
        frame.attrs["facts"] = {"known": len(knowledge.known), "asked": knowledge.asked}
    return frame


def check_plan(anatomy: Anatomy, plan: Plan, streamed: bool = False) -> None:
    """Raise an error, before any work, if a row cannot be computed, or a budget is out of every method's reach.

    streamed: with one block in memory at a time, so that the weights are not there to be looked at.
    """
    if streamed and task_of(anatomy.model) == "embedding":
        raise TransectError(
            f"{type(anatomy.model).__name__} has no head: its rows are judged by the hidden states of the whole dense "
            "model, which --stream never has in memory; compare it in memory"
        )
    matrices = anatomy.matrices(plan.roles)
    known = {*plan.methods, *(row.allocation for row in plan.rows)}
    for name in set(plan.settings) - known:
        raise TransectError(f"parameters are given for {name!r}, which is not compared")
    reached: dict[float, OutOfReach | None] = {}  # why a budget is out of reach, or None
    for row in plan.rows:
        if row.method is None:
            continue
        if streamed:
            check_streams(plan.recipe(row))
        try:
            plan.recipe(row).resolved(anatomy, matrices)
            reached[row.keep] = None
        except OutOfReach as error:
            reached.setdefault(row.keep, error)
    for reason in reached.values():
        if reason is not None:
            raise reason
    if plan.lengths:
        check_lengths(anatomy.model, plan.lengths)
    if not streamed:
        anatomy.check_finite()


def table(plan: Plan, folder: Path, lost: Mapping[Row, str]) -> pd.DataFrame:
    """The rows of the plan, in its order. lost: why some were not computed."""
    import pandas as pd

    dense, *_ = plan.rows
    if dense in lost:
        raise TransectError(f"{dense}: {lost[dense]}. The rows that are finished are kept; the same call goes on")
    rows = [
        plan.finished(folder, row)
        or {
            "method": row.beside or row.method,
            "allocation": row.allocation,
            "keep": None if row.beside else row.keep,
            "note": lost[row],
        }
        for row in plan.rows
    ]
    frame = pd.DataFrame([_beside_dense(row, rows[0]) for row in rows])
    frame.attrs["shares"] = plan.dtype
    frame.attrs["beside"] = list(plan.beside)
    frame.attrs["lengths"] = list(plan.lengths)
    frame.attrs["notes"] = notes_of(plan.methods)
    frame.attrs["lost"] = [str(row) for row in lost]
    return frame


def notes_of(methods: Sequence[str]) -> list[str]:
    """What a user should know of these methods beside their numbers, each note once with those that it is about."""
    about: dict[str, list[str]] = {}
    for name in methods:
        if note := method(name).note:
            about.setdefault(note, []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in about.items()]


def _beside_dense(row: Mapping[str, Any], dense: Mapping[str, Any], text: str = "") -> dict[str, Any]:
    """The row with its loss over the dense model's and the standard error of that, in place of its examples.

    What was measured at lengths of prompts has columns that end with the length.

    text: the row is what was measured on another text, of which this is the name; its columns end with it.
    """
    beside, of = {}, f", {text}" if text else ""
    for name, value in row.items():
        if name == "examples":
            compared = row is not dense
            beside[f"over_dense{of}"] = row["loss"] - dense["loss"] if compared else None
            beside[f"over_dense_error{of}"] = standard_error(value, dense["examples"]) if compared else None
        elif name == "also":
            for other, measured in value.items():
                beside |= _beside_dense(measured, dense["also"][other], other)
        elif name == "lengths":
            beside |= {f"{key} at {one['length']}": one[key] for one in value for key in one if key != "length"}
        else:
            beside[f"{name}{of}"] = value
    return beside


class _Plan(Protocol):
    def is_in(self, folder: Path) -> bool: ...

    def save(self, path: Path) -> None: ...


def take_folder(folder: Folder, plan: _Plan, overwrite: bool) -> None:
    """Make the run folder, or go on in it; TransectError if it holds something else. plan: of a contest, too."""
    folder.take()
    if not plan.is_in(folder.path) and not folder.is_empty:
        if not overwrite:
            raise TransectError(
                f"the folder {folder.path} holds a run with another model, data or settings, or of another version; "
                "pass overwrite=True (--overwrite) to replace it, or choose another folder"
            )
        folder.empty(last=RUN)
    plan.save(folder.file(RUN))


def _all_of(texts: Mapping[str, Batches] | None) -> Iterator[Batch]:
    for batches in (texts or {}).values():
        yield from batches


def _for_other_processes(
    anatomy: Anatomy, plan: Plan, folder: Folder, calibration: Any, evaluation: Any, also: Mapping[str, Batches]
) -> Plan:
    """Put the data, and a model that exists only in memory, where other processes find them."""
    calibration.save(folder.file("calibration.safetensors"))
    evaluation.save(folder.file("evaluation.safetensors"))
    for batches in also.values():
        batches.save(folder.file(also_file(batches.fingerprint)))
    if plan.model:
        return plan
    dense = folder.path / "dense"

    def listed(written: Path) -> None:
        folder.add(*(str(Path("dense", file.relative_to(written))) for file in written.rglob("*") if file.is_file()))

    save(anatomy.model, dense, overwrite=True, beside=listed)
    return replace(plan, model=str(dense))
