"""Running a probe for a claim."""

from __future__ import annotations

from typing import Any

from ..data import Specimen
from ..probes import Result as Found
from ..probes import run_probes
from .registry import NotApplicable


def probed(specimen: Specimen, name: str, **settings: Any) -> Found:
    """What the probe finds in a model; not applicable where the probe says nothing about it."""
    inspection = run_probes(specimen, {name: settings})
    if name in inspection.refused:
        raise NotApplicable(inspection.refused[name])
    return inspection[name]
