"""Trained models that claims convert and train on, each measured before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..anatomy import Anatomy
from ..conversion import Calibration, Stage, conversion_named
from ..conversion.repair import repair
from ..data.split import split
from ..errors import NotApplicable, TransectError
from ..forward import at_rest
from ..training import Machine, Run, Schedule, State
from .context import Context, Measured

BATCH = 8


@dataclass(frozen=True)
class Converted:
    """A model that was converted and trained: its anatomy, and its loss before and after the training."""

    anatomy: Anatomy
    before: Measured
    after: Measured


def converted(
    context: Context,
    method: str,
    settings: Mapping[str, Any],
    steps: int,
    *,
    seed: int = 0,
    lr: float = 0.0,
    change: Callable[[Anatomy], None] = lambda anatomy: None,
    stages: Sequence[Stage] | None = None,
) -> Converted:
    """A copy of the model, converted, and trained on the calibration text.

    lr: in place of the stages' own, where it is above 0. change: called with what was converted, before it is measured.
    stages: of the training, in place of the conversion's. Not applicable where the model cannot be converted.
    """
    context.require_language_model()
    chosen = conversion_named(method)
    values = chosen.settings(dict(settings))
    anatomy = context.fresh().anatomy
    stages = chosen.training(values) if stages is None else stages
    teacher = copy.deepcopy(anatomy.model).requires_grad_(False) if any(one.needs_teacher for one in stages) else None
    training, held_out = split(context.calibration, 0.1, BATCH, seed)
    with at_rest(anatomy.model):
        try:
            chosen.check(anatomy, **values)
        except TransectError as reason:
            raise NotApplicable(str(reason)) from None
        made = chosen.function(anatomy, Calibration(training, seed), **values)
        anatomy = anatomy if made is None else Anatomy(made)
        change(anatomy)
    before = context.evaluate(anatomy.model, 1.0)
    schedule = Schedule(lr=lr, steps=steps, epochs=steps, seed=seed)
    run = Run(schedule, Machine(anatomy.model.device), State(None), context.progress)
    with at_rest(*(one for one in (anatomy.model, teacher) if one is not None), frozen=True):
        repair(anatomy, teacher, stages, run, training, held_out)
    return Converted(anatomy, before, context.evaluate(anatomy.model, 1.0))
