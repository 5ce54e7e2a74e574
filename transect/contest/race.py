"""Trainings side by side: each entrant at its best rate, over seeds, on the same data in the same order."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comparison.compare import take_folder
from ..data import Batches
from ..errors import TransectError
from ..evaluation import standard_error
from ..pool import Engine
from ..store import Folder
from .plan import Plan, Trial
from .trials import UNFINISHED, run_trials
from .worker import Worker, load_worker, text_file

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none

TARGET, FORGETS = "eval", "forgets"


def race_model(
    model: Any,
    plan: Plan,
    folder: Folder,
    training: Batches,
    texts: Mapping[str, Batches],
    *,
    workers: int = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> pd.DataFrame:
    """Run all trials of the plan into `folder` and return the table; see `transect.race`.

    First the grid of rates of every entrant with the first seed, then the other seeds at the best rate of each. A
    folder that holds a contest of the same model, data and settings is gone on with.
    """
    take_folder(folder, plan, overwrite)

    def save_texts() -> None:
        for name, batches in {"training": training, **texts}.items():
            batches.save(folder.file(text_file(name)))

    def run(trials: Sequence[Trial]) -> dict[Trial, str]:
        worker = Worker(folder.path, plan, model, training, texts)
        load = partial(load_worker, folder.path.resolve(), plan)
        here = partial(worker.run, on_trial=on_trial)
        return run_trials(plan, folder, trials, load, here, workers, engine, on_trial, save_texts)

    grids = [trial for entrant in plan.entrants for trial in plan.grid(entrant)]
    lost = run([Trial(None, None, 0), *grids])
    chosen = [plan.chosen(folder.path, entrant) for entrant in plan.entrants]
    lost |= run([other for trial in chosen if trial is not None for other in plan.others(trial)])
    with suppress(OSError):  # it is empty, unless a training was lost
        (folder.path / UNFINISHED).rmdir()
    return table(plan, folder.path, lost)


def table(plan: Plan, folder: Path, lost: Mapping[Trial, str]) -> pd.DataFrame:
    """A row for the base model and one for each entrant, over its seeds."""
    import pandas as pd

    base = plan.finished(folder, Trial(None, None, 0))
    if base is None:
        raise TransectError(f"the base model: {next(iter(lost.values()), 'not measured')}; the same call tries again")
    texts = base["texts"]
    rows: list[dict[str, Any]] = [
        {"method": "base", **{name: text["loss"] for name, text in texts.items()}, "seeds": 0}
    ]
    for entrant in plan.entrants:
        row: dict[str, Any] = {"method": entrant.name, "share": entrant.share}
        best = plan.chosen(folder, entrant)
        if best is None:
            reasons = [plan.finished(folder, trial) or {"note": lost.get(trial)} for trial in plan.grid(entrant)]
            rows.append({**row, "note": next((r.get("note") for r in reasons if r.get("note")), "not run")})
            continue
        found = [plan.finished(folder, trial) for trial in [best, *plan.others(best)]]
        done = [result for result in found if result is not None and "texts" in result]
        rows.append({**row, "rate": best.rate, **_summary(done, texts)})
    frame = pd.DataFrame(rows)
    frame.attrs["lost"] = [str(trial) for trial in lost]
    frame.attrs["rates"] = sorted(plan.rates)
    return frame


def _summary(done: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, Any]:
    """What an entrant's seeds come to. `NAME`: mean loss on a text; its change from the base model, the standard error
    of that over sequences (of the change averaged over seeds), and the standard error over seeds."""
    row: dict[str, Any] = {}
    for name, before in base.items():
        losses = [result["texts"][name]["after"] for result in done]
        runs = [result["texts"][name]["examples"] for result in done]
        mean = [
            (statistics.fmean(nats), counts[0])
            for nats, counts in (zip(*each, strict=True) for each in zip(*runs, strict=True))
        ]
        row[name] = statistics.fmean(losses)
        row[f"{name}_change"] = row[name] - before["loss"]
        row[f"{name}_error"] = standard_error(mean, [tuple(pair) for pair in before["examples"]])
        row[f"{name}_seed_error"] = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
    first = done[0]
    row |= {"trained": first["trained"], "size": first["size"], "optimizer_bytes": first["optimizer_bytes"]}
    row["seconds_a_step"] = statistics.fmean(result["seconds"] / max(1, result["steps"]) for result in done)
    return row | {"steps": first["steps"], "tokens": first["tokens"], "seeds": len(done)}
