"""One model, one conversion: check, convert, repair, and say what is left of it and what it costs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..anatomy import Anatomy
from ..arguments import accepted
from ..compression.all_or_nothing import all_or_nothing
from ..compression.fingerprint import computation_fingerprint
from ..data import Batches
from ..data.split import share, split
from ..errors import TransectError
from ..evaluation import (
    LossResult,
    check_lengths,
    evaluate_loss,
    generates_alike,
    model_bytes,
    parameters,
    quality_of,
    standard_error,
)
from ..forward import at_rest, task_of
from ..recovery.trained import check_peft
from ..statistics import Progress
from ..training import Machine, OnCheck, Run, Schedule, State, held_out_loss, on_device
from ..version import __version__
from .registry import Calibration, Conversion, conversion_named
from .repair import repair
from .stage import Lowered, Stage, Train

KIND = "an unfinished conversion"  # what the folder of one is


@dataclass(frozen=True)
class Plan:
    """A conversion and the training after it.

    method, settings: the conversion and its parameters. steps: of the training, shared out among its stages; 0 converts
    only; default one pass over the data. lr, train, lowers: in place of what the paper prescribes for each stage.
    epochs ... every, seed: see `transect.recovery.Settings`. held_out: share of the sequences, the last ones, that only
    choose the best state.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: int = 1
    lr: float | None = None
    train: Train | None = None
    lowers: Lowered | None = None
    batch_size: int = 8
    accumulate: int = 1
    held_out: float = 0.1
    every: int | None = None
    seed: int = 0

    def resolved(self) -> Plan:
        """The same with all settings of the conversion; TransectError for a value that means nothing."""
        chosen = conversion_named(self.method)
        for name, least in {"steps": 0, "epochs": 1, "batch_size": 1, "accumulate": 1, "every": 1}.items():
            given = getattr(self, name)
            if given is not None and (type(given) is not int or given < least):
                raise TransectError(f"{name} should be a whole number of at least {least}, not {given!r}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise TransectError(f"lr should be a number above 0, not {self.lr!r}")
        if not 0 < self.held_out < 1:
            raise TransectError(f"held_out should be between 0 and 1, not {self.held_out!r}")
        for name, kind in {"train": Train, "lowers": Lowered}.items():
            if getattr(self, name) is not None:
                accepted(kind, getattr(self, name), name)
        return replace(self, settings=chosen.settings(dict(self.settings)))

    @property
    def conversion(self) -> Conversion:
        """What is registered under the method's name."""
        return conversion_named(self.method)

    @property
    def stages(self) -> list[Stage]:
        """The training, with what the user changed of it."""
        if self.steps == 0:
            return []
        stages = self.conversion.training(dict(self.settings))
        if self.train == "new" and not all(stage.new for stage in stages):
            raise TransectError(f"{self.method} does not train what it adds by itself: choose train='full' or 'lora'")
        changed: dict[str, Any] = {} if self.train is None else {"train": self.train, "roles": None}
        changed |= {} if self.train in (None, "new") else {"new": ""}
        changed |= {} if self.lowers is None else {
            "lowers": self.lowers, "loss": None, "judged": None, "teacher": False,
        }  # fmt: skip
        stages = [replace(stage, **changed) for stage in stages]
        if any(stage.within is not None and stage.train == "lora" for stage in stages):
            raise TransectError(f"{self.method} trains slices of the matrices, which low-rank updates do not have")
        return stages

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the structure record's history."""
        return asdict(self)


def convert_anatomy(
    anatomy: Anatomy,
    plan: Plan,
    data: Batches | None = None,
    texts: Mapping[str, Batches] | None = None,
    *,
    lengths: Sequence[int] = (),
    machine: Machine | None = None,
    state: State | None = None,
    progress: Progress | None = None,
    on_check: OnCheck = lambda check: None,
) -> tuple[Any, dict[str, Any]]:
    """Convert the model, in place unless the conversion makes another, and train it; the model, and what came of it.

    data: what is trained on, but for its last sequences, which only choose the best state; also what the conversion
    looks at. texts: on which the model is measured as it was, converted, and trained, by name. lengths: of prompts at
    which speed, operations and cache are measured, before and after.

    The outcome has `loss_dense`, `loss_converted`, `loss_after` (on the held-out sequences, in nats; the last is the
    second without training), `texts` (for each: dense, converted, after, and the standard errors of the last two's
    distances from the first), `parameters` and `bytes` (before, after), `quality` (of both, see `Quality`),
    `generates` (whether generation with the cache writes what it writes without; None for other models than causal
    ones), `told`, `stages` (name, steps, tokens, seconds, checks of each), and `exact`.
    Raises TransectError before any change if something cannot be done. After an error while it is converted the model
    is as before; after one in the training it is converted, with the best numbers so far.
    """
    plan = plan.resolved()
    chosen, model = plan.conversion, anatomy.model
    causal = task_of(model) == "causal"
    if chosen.causal and not causal:
        raise TransectError(f"{chosen.name} is for models that predict the next token, and this is none")
    anatomy.check_finite()
    chosen.check(anatomy, **plan.settings)
    if lengths:
        check_lengths(model, lengths)
    stages = plan.stages if data is not None else []
    if any(stage.train == "lora" for stage in stages):
        check_peft()
    if plan.steps and not stages:
        untrained = f"{chosen.name} prescribes no training: leave steps out"
        raise TransectError("training needs data=" if data is None else untrained)
    training, held_out = (None, None) if data is None else split(data, plan.held_out, plan.batch_size, plan.seed)
    machine, state = machine or Machine(), state or State(None)
    noted = {
        "transect": __version__, "convert": plan.to_dict(), "data": None if data is None else data.fingerprint,
        "model": computation_fingerprint(model), "machine": machine.to_dict(),
    }  # fmt: skip
    state.begin(json.dumps(noted, sort_keys=True, default=str))
    machine.wait()
    sizes = {"parameters": [parameters(model)], "bytes": [model_bytes(model)]}
    teacher = copy.deepcopy(model).requires_grad_(False) if any(stage.needs_teacher for stage in stages) else None
    calibration = Calibration(training, plan.seed, progress)
    losses: list[dict[str, LossResult]] = []
    held: list[float] = []

    def measure(one: Any) -> None:
        losses.append({name: evaluate_loss(one, batches) for name, batches in (texts or {}).items()})
        if held_out is not None:
            with at_rest(one):
                held.append(held_out_loss(one, share(held_out, machine.index, machine.count), machine))

    quality = [[asdict(one) for one in quality_of(model, lengths)]] if lengths else []
    with on_device(machine, [one for one in (model, teacher) if one is not None]):
        measure(model)
        with all_or_nothing(model), at_rest(model):
            made = chosen.function(anatomy, calibration, **plan.settings)
            converted = anatomy if made is None else Anatomy(made)
            converted.check_finite()
            if lengths:
                check_lengths(converted.model, lengths, "the converted model")
        model = converted.model
        measure(model)
        courses = []
        if stages and training is not None and held_out is not None:
            schedule = Schedule(
                lr=plan.lr or 0.0, epochs=plan.epochs, steps=plan.steps, accumulate=plan.accumulate, every=plan.every,
                seed=plan.seed,
            )  # fmt: skip
            run = Run(schedule, machine, state, progress, on_check)
            models = [one for one in (model, teacher) if one is not None]
            with at_rest(*models, frozen=True):
                courses = repair(converted, teacher, stages, run, training, held_out)
            if chosen.after is not None:
                chosen.after(converted, calibration)
            measure(model)
    sizes["parameters"].append(parameters(model))
    sizes["bytes"].append(model_bytes(model))
    if quality:
        quality.append([asdict(one) for one in quality_of(model, lengths)])
    outcome = {
        "method": chosen.name, "exact": chosen.exact,
        **({"loss_dense": held[0], "loss_converted": held[1], "loss_after": held[-1]} if held else {}),
        "texts": {name: _beside([each[name] for each in losses]) for name in texts or {}},
        **sizes, "quality": quality, "generates": generates_alike(model) if causal else None, "told": calibration.told,
        "stages": [
            {
                "name": stage.name, "steps": course.steps, "tokens": course.tokens, "trained": course.numbers,
                "seconds": round(course.seconds, 3), "before": course.before, "best": course.best,
                "best_step": course.best_step, "checks": course.checks,
            }
            for stage, course in zip(stages, courses, strict=True)
        ],
    }  # fmt: skip
    converted.record.history.append({"transect": __version__, "convert": plan.to_dict(), **outcome})
    return model, outcome


def _beside(found: list[LossResult]) -> dict[str, Any]:
    """The losses as it was, converted, trained, and the standard errors of the latter's distances from the first."""
    if len(found) < 3:
        found = [*found, found[-1]]
    dense, *others = found
    return {
        "loss": [one.loss for one in found],
        "error": [standard_error(one.examples, dense.examples) for one in others],
    }
