"""Running one study, with or without a folder in which it can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..probes import Result
from ..statistics import Progress
from ..store import Folder
from ..version import __version__
from .registry import Bench, Study

KIND = "a study"  # what its folder is


def run_study(
    study: Study,
    given: Mapping[str, Any],
    *,
    seed: int = 0,
    device: str = "cpu",
    folder: Folder | None = None,
    progress: Progress | None = None,
) -> Result:
    """What it finds. given: settings. folder: one of ours; the same study of the same settings and seed goes on there.

    Raises TransectError for an unknown setting before any work.
    """
    settings = study.settings(given)
    described = json.dumps([__version__, study.name, settings, seed], sort_keys=True)
    key = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    found = None if folder is None else Result.load(folder, study.name, key)
    if found is not None:
        return found
    result = study.function(Bench(seed, device, progress, folder, key), **settings)
    result.probe, result.settings = study.name, settings
    if folder is not None:
        result.save(folder, key)
    return result
