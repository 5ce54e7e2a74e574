"""One model, one adaptation: attach, train on new text, and see what was learned and what was forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..checkpoint import Opened
from ..compression.fingerprint import computation_fingerprint
from ..data import Batches
from ..data.split import share, split
from ..errors import Diverged, TransectError
from ..evaluation import LossResult, standard_error
from ..forward import Batch, at_rest
from ..goals import Goal
from ..statistics import Progress
from ..training import (
    Machine,
    OnCheck,
    Problem,
    Run,
    Seen,
    State,
    on_device,
    penalty_named,
    train,
    watching,
)
from ..version import __version__
from .attached import Attached, Replaced, prepared
from .rates import renew_rates
from .settings import Settings
from .targets import targets_of


def adapt_anatomy(
    anatomy: Anatomy,
    settings: Settings,
    data: Batches,
    texts: Mapping[str, Batches] | None = None,
    *,
    goal: Goal | None = None,
    machine: Machine | None = None,
    state: State | None = None,
    progress: Progress | None = None,
    on_check: OnCheck = lambda check: None,
    examples: bool = False,
) -> tuple[Attached | Replaced, dict[str, Any]]:
    """Train the model on the data, in place; the model with its adapter, and what came of it.

    data: of which the last sequences only choose the best state. texts: on which the model is measured before and
    after, by name. goal: what is lowered, made of the settings' objective and the model's tokenizer; the model's own
    loss needs none. state: where unfinished work is kept; the same call goes on from there.

    The outcome has `loss_before` and `loss_after` (on the held-out sequences, in nats; of a parametrization as it would
    be stored, the start too), `kept` (which state that is),
    `texts` (for each: loss before, after, and the standard error of the difference over its sequences, and `accuracy`
    before and after; with `examples`, also the nats and predictions of each sequence afterwards), `told` (what the
    method has to say: words, and a number), `trained` (numbers), `optimizer_bytes`, `steps`, `tokens`, `seconds`, and
    `checks` (step, training loss, held-out loss).
    Raises TransectError: before any change if something cannot be done; and if the loss stops being finite, in which
    case the best numbers so far are in the state and the model is as it was.
    """
    settings = settings.resolved()
    model = anatomy.model
    if model.dtype == torch.float16:
        raise TransectError("small gradients vanish in float16: open the model in bfloat16 or float32 (dtype, --dtype)")
    anatomy.check_finite()
    goal = goal or settings.goal(Opened(model, None, None, "", None))
    attach = prepared(anatomy, settings)
    training, held_out = split(data, settings.held_out, settings.batch_size, settings.seed)
    machine, state = machine or Machine(), state or State(None)
    plan = {
        "transect": __version__, "adapt": settings.to_dict(), "data": data.fingerprint,
        "model": computation_fingerprint(model), "machine": machine.to_dict(),
    }  # fmt: skip
    state.begin(json.dumps(plan, sort_keys=True, default=str))
    machine.wait()
    layers = targets_of(anatomy, None)
    with on_device(machine, [model]), at_rest(model, frozen=True):
        before = {name: goal.evaluate(model, batches) for name, batches in (texts or {}).items()}
        attached = attach()
        try:
            judging = share(held_out, machine.index, machine.count)
            with watching(list(anatomy.block_list)) if settings.penalties else nullcontext([]) as states:
                ours = share(training, machine.index, machine.count)
                steps = settings.schedule.total(math.ceil(len(ours) / settings.accumulate))
                problem = _problem(attached, settings, goal, ours, judging, machine, states, steps)
                if settings.layer_rates is not None:
                    renew_rates(problem, settings, model, layers)
                problem.tokens = [Batches([batch]).tokens for batch in training]
                attached.after_step(0, steps)
                course = train(problem, Run(settings.schedule, machine, state, progress, on_check), {})
                told = attached.told()
                attached.finish(problem.measure)
        except BaseException:
            attached.detach()
            raise
        after = {name: goal.evaluate(model, batches) for name, batches in (texts or {}).items()}
    attached.freeze_the_rest()
    outcome = {
        "method": settings.method, "loss_before": course.before,
        "loss_after": course.best if attached.held_out is None else attached.held_out,
        "kept": f"step {course.best_step}" if course.best_step else "start",
        "texts": {
            name: _change(before[name], after[name]) | ({"examples": after[name].examples} if examples else {})
            for name in after
        },
        "told": told, "trained": course.numbers, "optimizer_bytes": course.optimizer_bytes, "steps": course.steps,
        "tokens": course.tokens, "seconds": round(course.seconds, 3), "checks": course.checks,
    }  # fmt: skip
    return attached, outcome


def _problem(
    attached: Attached | Replaced,
    settings: Settings,
    goal: Goal,
    training: Sequence[Batch | None],
    held_out: Sequence[Batch | None],
    machine: Machine,
    states: list[Tensor],
    steps: int,
) -> Problem:
    model = attached.base

    def penalty(batch: Batch) -> Tensor | None:
        seen = Seen(model, goal.given(batch), list(states))

        def again() -> Tensor:
            loss, count = goal.loss(model, batch)
            return loss / count

        own = attached.penalty(again)
        terms = [penalty_named(name).function(seen, **given) for name, given in settings.penalties.items()]
        terms += [] if own is None else [own]
        return torch.stack([term.float() for term in terms]).sum() if terms else None

    return Problem(
        settings.method,
        attached.parameters,
        training,
        loss=lambda batch: goal.loss(model, batch),
        measure=lambda: goal.measure(model, held_out, machine),
        set_mode=model.train,
        penalty=penalty,
        after_step=lambda step, optimizer: attached.after_step(step, steps, optimizer),
        held=attached.held,
        put_back=attached.put_back,
    )


def _change(before: LossResult, after: LossResult) -> dict[str, Any]:
    """Loss before and after, the standard error of the difference, sequence by sequence, and both accuracies."""
    if not math.isfinite(after.loss):
        raise Diverged("the loss is not finite: the adapted model puts out NaN or infinity. Lower the rate")
    return {
        "before": before.loss, "after": after.loss, "error": standard_error(after.examples, before.examples),
        "accuracy": [before.accuracy, after.accuracy],
    }  # fmt: skip
