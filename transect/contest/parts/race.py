"""Parts side by side: each combination at its best rate, over seeds, on the same examples in the same order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...comparison.compare import take_folder
from ...pool import Engine
from ...store import Folder
from ...tasks import task_named
from ..trials import UNFINISHED, run_trials
from .judging import baselines_of
from .plan import Combination, PartsPlan, PartsTrial, SpeedTrial
from .speeds import crossover
from .worker import PartsWorker, load_parts_worker

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none


def race_parts(
    plan: PartsPlan,
    folder: Folder,
    *,
    workers: int = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    on_trial: Callable[[PartsTrial | SpeedTrial], None] = lambda trial: None,
) -> pd.DataFrame:
    """Run all trials of the plan into `folder` and return the table; see `transect.race_parts`.

    First the grid of rates of every entrant with the first seed, then the other seeds at the best rate of each, and in
    the end their speeds, in this process and one after another.
    """
    take_folder(folder, plan, overwrite)

    def run(trials: Sequence[PartsTrial]) -> dict[PartsTrial, str]:
        load = partial(load_parts_worker, folder.path.resolve(), plan)
        here = partial(PartsWorker(folder.path, plan).run, on_trial=on_trial)
        return run_trials(plan, folder, trials, load, here, workers, engine, on_trial)

    lost = run([trial for entrant in plan.entrants for trial in plan.grid(entrant)])
    chosen = [plan.chosen(folder.path, entrant) for entrant in plan.entrants]
    lost |= run([other for trial in chosen if trial is not None for other in plan.others(trial)])
    with suppress(OSError):  # it is empty, unless a training was lost
        (folder.path / UNFINISHED).rmdir()
    here = partial(PartsWorker(folder.path, plan).run, on_trial=on_trial)
    run_trials(plan, folder, plan.speeds, partial(load_parts_worker, folder.path, plan), here, 1, "local", on_trial)
    return table(plan, folder.path, lost)


def table(plan: PartsPlan, folder: Path, lost: Mapping[PartsTrial, str]) -> pd.DataFrame:
    """A row for each entrant, over its seeds; all but the first are compared with it, seed by seed. Then the baselines.

    In attrs: `curves`, the mean over seeds of [step, training loss, held-out loss, held-out accuracy] as the trainings
    go; `by`, the mean scores by what the answers are also looked at by, whose name is `over`; `scores`, the columns of
    further scores; `speeds`, a row for each measurement.
    """
    import pandas as pd

    curves: dict[str, list[list[float | None]]] = {}
    by: dict[str, dict[str, float]] = {}
    scores: list[str] = []
    rows: list[dict[str, Any]] = []
    reference: list[float] = []
    for number, entrant in enumerate(plan.entrants):
        row: dict[str, Any] = {"entrant": str(entrant)}
        best = plan.chosen(folder, entrant)
        if best is None:
            reasons = [plan.finished(folder, trial) or {"note": lost.get(trial)} for trial in plan.grid(entrant)]
            rows.append({**row, "note": next((r.get("note") for r in reasons if r.get("note")), "not run")})
            continue
        found = [plan.finished(folder, trial) for trial in [best, *plan.others(best)]]
        done = [result for result in found if result is not None and "loss" in result]
        losses = [result["loss"] for result in done]
        row |= {"rate": best.rate, "edge": best.rate in (min(plan.rates), max(plan.rates)) and len(plan.rates) > 1}
        row |= {"loss": statistics.fmean(losses), "loss_error": _error(losses)}
        if done[0]["accuracy"] is not None:
            accuracies = [result["accuracy"] for result in done]
            row |= {"accuracy": statistics.fmean(accuracies), "accuracy_error": _error(accuracies)}
        scores = list(done[0]["scores"])
        for name in scores:
            row[name] = statistics.fmean(result["scores"][name] for result in done)
        curves[str(entrant)] = [
            [None if None in values else statistics.fmean(values) for values in zip(*points, strict=True)]
            for points in zip(*(result["curve"] for result in done), strict=True)
        ]
        by[str(entrant)] = _mean_by([result["by"] for result in done])
        first = done[0]
        row |= {name: first[name] for name in ("parameters", "flops", "steps", "tokens")}
        row["seconds_a_step"] = statistics.fmean(result["seconds"] / max(1, result["steps"]) for result in done)
        row["forward_seconds"] = statistics.median(result["forward"] for result in done)
        row["seeds"] = len(done)
        if number == 0:
            reference = losses
        elif len(losses) == len(reference):
            row |= paired(losses, reference)
        rows.append(row)
    speeds = _speeds(plan, folder)
    for row, entrant in zip(rows, plan.entrants, strict=True):
        if (found := _crossover(plan, speeds, entrant)) is not None:
            row["crossover"] = found
    asked = task_named(plan.task)
    if asked.baselines is not None:
        drawn = asked.draw(plan.held_out, 3, plan.options)
        for row in baselines_of(drawn, asked.baselines(drawn, **plan.options)):
            by[row["entrant"]] = row.pop("by")
            rows.append(row)
    frame = pd.DataFrame(rows)
    frame.attrs |= {
        "lost": [str(trial) for trial in lost], "rates": sorted(plan.rates), "task": plan.task, "over": asked.over,
        "scores": scores,
        "curves": curves, "by": {name: values for name, values in by.items() if values}, "speeds": speeds,
    }  # fmt: skip
    return frame


def _mean_by(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {value: statistics.fmean(one[value] for one in found) for value in found[0]}


def _speeds(plan: PartsPlan, folder: Path) -> list[dict[str, Any]]:
    """A row for each measurement: entrant, length, and prefill, decode, memory and state, or a note (see `speed_at`).

    The model's own attention, where only others are compared with it, is called `own attention`.
    """
    entrants, rows = plan.entrants, []
    for trial in plan.speeds:
        if (result := plan.finished(folder, trial)) is not None:
            name = str(trial.entrant) if trial.entrant in entrants else _own(trial.entrant)
            rows.append({"entrant": name, "length": trial.length, **result})
    return rows


def _own(entrant: Combination) -> str:
    return " + ".join(["own attention", *(name for _, name in entrant.parts)])


def _crossover(plan: PartsPlan, speeds: Sequence[Mapping[str, Any]], entrant: Combination) -> float | None:
    """From which length on the entrant reads faster than with the model's own attention; None where that says nothing.

    A length at which only one of both could be measured counts for that one.
    """
    other = plan.reference(entrant)
    if other is None:
        return None
    reference = str(other) if other in plan.entrants else _own(other)
    taken = {(row["entrant"], row["length"]): row["prefill"] for row in speeds if "prefill" in row}
    pairs = []
    for length in sorted(plan.lengths):
        ours, theirs = taken.get((str(entrant), length)), taken.get((reference, length))
        if ours is not None or theirs is not None:
            pairs.append((length, ours or 1e9, theirs or 1e9))
    return crossover(*zip(*pairs, strict=True)) if pairs else None


def paired(losses: Sequence[float], reference: Sequence[float]) -> dict[str, float | None]:
    """The mean difference over seeds, its p-value (t-test of the pairs), and what could have been seen.

    detectable: the difference that a test at 5 % would find in 80 of 100 contests with as many seeds that scatter as
    these do. None where there are fewer than two pairs.
    """
    from scipy import stats

    differences = [one - other for one, other in zip(losses, reference, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return {"difference": mean, "p": None, "detectable": None}
    error = statistics.stdev(differences) / math.sqrt(count)
    if error == 0:
        return {"difference": mean, "p": 1.0 if mean == 0 else 0.0, "detectable": 0.0}
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return {"difference": mean, "p": p, "detectable": error * _shift(count - 1)}


def _shift(freedom: int) -> float:
    """By how many standard errors a mean has to be off for a two-sided t-test at 5 % to see it in 80 % of cases."""
    from scipy import stats

    critical = stats.t.ppf(0.975, freedom)
    low, high = 0.0, 1000.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        seen = stats.nct.sf(critical, freedom, middle)
        low, high = (low, middle) if seen >= 0.8 else (middle, high)
    return high


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
