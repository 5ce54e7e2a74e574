"""`transect.study`: small models are trained to answer a question about trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..arguments import checked
from ..parameters import Seed
from ..probes import Result
from ..report import INDEX, write_study
from ..statistics import Progress
from ..store import Folder, alone
from ..studies import KIND, run_study, study_named
from .arguments import Device, FolderName


@checked
def study(
    name: str,
    *,
    out: FolderName | None = None,
    seed: Seed = 0,
    device: Device = "cpu",
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Train a study's own small models and say what came out.

    name: see `transect.studies.studies()`. settings: its own; `transect methods NAME` lists them.
    out: a folder for the report (index.html), the raw results (data), what was trained (made), and what the study
        writes beside. The same call goes on where it was interrupted; other files in it are left alone.
    seed, device: of what is trained.
    Raises TransectError for an unknown study or setting before any work.
    """
    chosen = study_named(name)
    chosen.settings(settings)
    if out is None:
        return run_study(chosen, settings, seed=seed, device=device, progress=progress)
    folder = Folder(Path(out).expanduser(), KIND)
    folder.check_place(among_others=True)
    folder.check(INDEX, *chosen.files, *Result.files(name))
    with alone(folder.path):
        folder.take(among_others=True)
        found = run_study(chosen, settings, seed=seed, device=device, folder=folder, progress=progress)
        write_study(folder, chosen, found, seed, device)
    return found
