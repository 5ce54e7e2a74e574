"""Running a probe for a claim, and on the same model before any training."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from ..anatomy import Anatomy
from ..data import Specimen
from ..probes import Result as Found
from ..probes import run_probes
from .context import Context
from .registry import NotApplicable


def probed(specimen: Specimen, name: str, **settings: Any) -> Found:
    """What the probe finds in a model; not applicable where the probe says nothing about it."""
    inspection = run_probes(specimen, {name: settings})
    if name in inspection.refused:
        raise NotApplicable(inspection.refused[name])
    return inspection[name]


def probed_once(context: Context, name: str, **settings: Any) -> Found:
    """What the probe finds in the model at hand, once for all claims of a run."""
    key = f"{name} {settings}"
    if key not in context.shared:
        context.shared[key] = probed(context.specimen, name, **settings)
    return context.shared[key]


def untrained(specimen: Specimen) -> Specimen:
    """The specimen on a model of the same configuration with random weights, from the specimen's seed."""
    model = specimen.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(specimen.seed)
        fresh = type(model)(copy.deepcopy(model.config))
    fresh = fresh.to(device=model.device, dtype=torch.float32).eval()
    return replace(specimen, anatomy=Anatomy(fresh, specimen.anatomy.architecture))
