"""What contests share: a plan in run.json, trials of which each has a file, and running those that have none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ..errors import TransectError
from ..pool import Engine, run_in_processes, run_on_ray
from ..pool.processes import Load
from ..store import Folder, kept_json, read_json, write_text

KIND = "a contest"  # what its folder is, see `transect.store.Folder`
RUN = "run.json"
UNFINISHED = "unfinished"  # folder of trainings in progress


class Trial(Protocol):
    """One training; hashable, and says what it is."""

    @property
    def file(self) -> str:
        """Where its result lies in the run folder; no two trials lie in one place."""
        ...


class Kept:
    """A dataclass of a contest's settings, as they stand in run.json.

    A subclass has a `fingerprint`, a hash of everything that decides a trial's numbers, but not which there are, and
    `of(trial)`, what the trial's file belongs to.
    """

    fingerprint: Any

    def of(self, trial: Any) -> str:
        """What the trial's file belongs to."""
        raise NotImplementedError

    def finished(self, folder: Path, trial: Trial) -> dict[str, Any] | None:
        """The trial's result if it is in the run folder."""
        return kept_json(folder / trial.file, self.of(trial))

    def save(self, path: Path) -> None:
        """Write it as a run folder's run.json."""
        described = {**asdict(self), "fingerprint": self.fingerprint}  # type: ignore[call-overload]
        write_text(path, json.dumps(described, indent=2, default=str) + "\n")

    def is_in(self, folder: Path) -> bool:
        """Whether the contest in a run folder is this one, whichever trials it has."""
        try:
            return read_json(folder / RUN).get("fingerprint") == self.fingerprint
        except TransectError:  # there is none, or it is damaged
            return False


def run_trials(
    plan: Kept,
    folder: Folder,
    trials: Sequence[Any],
    load: Load,
    here: Callable[[Sequence[Any]], object],
    workers: int,
    engine: Engine,
    on_trial: Callable[[Any], None],
    before: Callable[[], None] = lambda: None,
) -> dict[Any, str]:
    """Run those trials that have not run; why some could not, if their process was lost twice.

    load: makes a worker in another process. here: runs trials in this one, where that is what is asked for.
    before: called before other processes start.
    """

    def finished(trial: Any) -> bool:
        return plan.finished(folder.path, trial) is not None

    waiting = []
    for trial in dict.fromkeys(trials):
        if finished(trial):
            on_trial(trial)
        else:
            waiting.append(trial)
    for trial in waiting:
        folder.file(trial.file)
    if not waiting:
        return {}
    if engine == "local" and workers == 1:
        here(waiting)
        return {}
    before()
    run = run_on_ray if engine == "ray" else run_in_processes
    return run(load, [[trial] for trial in waiting], workers, on_trial, finished)
