"""One model, one repair: split the data, train, and keep what is best on the held-out part."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from ..anatomy import Anatomy
from ..compression.fingerprint import computation_fingerprint
from ..data import Batches
from ..data.split import share, split
from ..errors import TransectError
from ..forward import at_rest, with_states_of
from ..statistics import Progress
from ..training import (
    Course,
    Machine,
    OnCheck,
    Parameters,
    Problem,
    Run,
    State,
    distance_from,
    held_out_loss,
    on_device,
    own_loss,
    train,
)
from ..version import __version__
from .blocks import distill_blocks
from .job import Job
from .settings import Settings
from .teacher import check_teacher
from .trained import changed_parameters, check_peft, trainable, training_mode


def recover_anatomy(
    anatomy: Anatomy,
    settings: Settings,
    data: Batches,
    teacher: Any = None,
    *,
    machine: Machine | None = None,
    state: State | None = None,
    progress: Progress | None = None,
    on_check: OnCheck = lambda check: None,
) -> dict[str, Any]:
    """Repair the model in place; returns what came of it, which is also noted in the structure record's history.

    data: of which the last sequences only measure. teacher: the dense model, for the two distillations.
    state: where unfinished work is kept; the same call goes on from there. Who made it removes it at the end.
    Numbers change and nothing else: which factors there are, indices, masks and scales stay as they were.

    Returns `loss_before` and `loss_after` (held-out, in nats), `kept` (which state that is: "step 40", "every block's
    best", or "start", since a repair that makes the model worse is undone), `steps`, `tokens` and `seconds` that it
    took, `trained_parameters`, and `checks` (of each training: step, training loss, held-out loss).
    Raises TransectError, before any change if something cannot be done, and also if the loss stops being finite: then
    the model is left with the best numbers so far.
    """
    settings = settings.resolved()
    model = anatomy.model
    if settings.train == "lora":
        check_peft()
    check_teacher(anatomy, teacher, settings)
    if model.dtype == torch.float16:
        raise TransectError("small gradients vanish in float16: open the model in bfloat16 or float32 (dtype, --dtype)")
    anatomy.check_finite()
    changed = changed_parameters(anatomy, settings)
    training, held_out = split(data, settings.held_out, settings.batch_size, settings.seed)
    if teacher is not None:
        training, held_out = (Batches(with_states_of(teacher, part)) for part in (training, held_out))
    machine, state = machine or Machine(), state or State(None)
    plan = {
        "transect": __version__, "recover": settings.to_dict(), "data": data.fingerprint,
        "model": computation_fingerprint(model),
        "teacher": None if teacher is None else computation_fingerprint(teacher), "machine": machine.to_dict(),
    }  # fmt: skip
    state.begin(json.dumps(plan, sort_keys=True))
    machine.wait()
    job = Job(
        settings, Run(settings.schedule, machine, state, progress, on_check),
        share(training, machine.index, machine.count), share(held_out, machine.index, machine.count),
        [Batches([batch]).tokens for batch in training],
    )  # fmt: skip
    models = [one for one in (model, teacher) if one is not None]
    with on_device(machine, models), at_rest(*models, frozen=True):
        before = held_out_loss(model, job.held_out, machine)
        if not math.isfinite(before):
            raise TransectError(f"the model's loss on the held-out data is {before} before any repair; mend that first")
        start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in changed.items()}
        if settings.how == "blocks":
            courses = distill_blocks(anatomy, Anatomy(teacher), changed, job)
            kept = "every block's best"
        else:
            courses = [_train_whole(anatomy, teacher, changed, job)]
            kept = f"step {courses[0].best_step}"
        after = held_out_loss(model, job.held_out, machine)
        if not after < before:
            after, kept = before, "start"
            with torch.no_grad():
                for name, parameter in changed.items():
                    parameter.copy_(start[name])
    outcome = {
        "loss_before": before, "loss_after": after, "kept": kept,
        "steps": sum(course.steps for course in courses), "tokens": sum(course.tokens for course in courses),
        "seconds": round(sum(course.seconds for course in courses), 3),
        "trained_parameters": sum(course.numbers for course in courses), "checks": [c.checks for c in courses],
    }  # fmt: skip
    anatomy.record.history.append({"transect": __version__, "recover": settings.to_dict(), **outcome})
    return outcome


def _train_whole(anatomy: Anatomy, teacher: Any, changed: Parameters, job: Job) -> Course:
    """Train all blocks at once, towards the data or towards the teacher's predictions."""
    model, blocks = anatomy.model, anatomy.block_list

    def loss(batch: Any) -> tuple[torch.Tensor, int]:
        if teacher is None:
            return own_loss(model, batch)
        return distance_from(teacher, model, batch, job.settings.temperature)

    def measure() -> float:
        return held_out_loss(model, job.held_out, job.run.machine)

    def set_mode() -> None:
        model.eval()
        training_mode(blocks)

    with trainable(blocks, changed, job.settings) as parameters:
        problem = Problem(job.settings.how, parameters, job.training, loss, measure, set_mode, job.tokens)
        return train(problem, job.run, {})
