"""Models whose MLPs run fewer neurons, by experts or by pruning, before and after the same short training."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..anatomy import MLP, Anatomy
from ..conversion import Plan, Stage, convert_anatomy
from ..conversion.catalog.dense2moe import neuron_importance
from ..conversion.repair import repair
from ..data import Batches
from ..data.split import split
from ..errors import TransectError
from ..forward import at_rest
from ..training import Machine, Run, Schedule, State
from .context import Context, Measured
from .ordering import Comparison, comparison
from .registry import NotApplicable

BATCH, HELD_OUT, RATE = 4, 0.1, 1e-3


def cut(context: Context, method: str, seed: int = 0, **settings: Any) -> Anatomy:
    """A copy of the model, converted by that method and not trained; not applicable where it cannot be."""
    context.require_language_model()
    anatomy = context.fresh().anatomy
    plan = Plan(method, settings, steps=0, batch_size=BATCH, held_out=HELD_OUT, seed=seed)
    try:
        return Anatomy(convert_anatomy(anatomy, plan, context.calibration)[0])
    except TransectError as reason:
        raise NotApplicable(str(reason)) from None


def pruned(context: Context, share: float) -> Anatomy:
    """A copy in which each MLP keeps that share of its neurons: those of the largest Taylor scores."""
    anatomy = context.fresh().anatomy
    layers = list(range(len(anatomy.blocks)))
    scores = neuron_importance(anatomy, layers, _parts(context)[0])
    for number in layers:
        mlp: MLP = anatomy.blocks[number].mlp  # type: ignore[assignment]
        mlp.keep(scores[number].topk(max(1, round(share * mlp.neurons))).indices.sort().values.tolist())
    return anatomy


def of_mlps(anatomy: Anatomy) -> str:
    """A pattern of the names of the MLPs' numbers, for a stage that trains these alone."""
    paths = {re.escape(matrix.path) for matrix in anatomy.matrices(("gate", "up", "down"))}
    return f"^({'|'.join(sorted(paths))})\\."


def repaired(context: Context, anatomy: Anatomy, stages: Sequence[Stage], steps: int, seed: int = 0) -> Any:
    """The model after that many steps in all, shared out among the stages, at one rate for all of them."""
    training, held_out = _parts(context)
    teacher = copy.deepcopy(context.model).float().requires_grad_(False)
    schedule = Schedule(lr=RATE, steps=steps, epochs=steps, every=max(1, steps // 2), seed=seed)
    run = Run(schedule, Machine(context.model.device), State(None), context.progress)
    with at_rest(anatomy.model, teacher, frozen=True):
        repair(anatomy, teacher, stages, run, training, held_out)
    return anatomy.model


def before_and_after(
    context: Context, share: float, ours: tuple[str, Anatomy, Sequence[Stage]],
    theirs: tuple[str, Anatomy, Sequence[Stage]], steps: int, untrained: bool = True,
) -> list[Comparison]:  # fmt: skip
    """The first model's loss against the second's, as they are and after the same number of steps.

    share: of the MLPs' neurons that run. Each is given with its name and its stages. untrained: compare these, too.
    """
    found: list[list[tuple[str, Measured]]] = [[], []]
    for name, anatomy, stages in (ours, theirs):
        found[0].append((name, context.evaluate(anatomy.model, share)))
        found[1].append((f"{name}, trained", context.evaluate(repaired(context, anatomy, stages, steps), share)))
    return [comparison(share, *pair) for pair in (found if untrained else found[1:])]


def distilled(stage: Stage, pattern: str) -> list[Stage]:
    """The stage, as the only one, that trains what the pattern names."""
    return [replace(stage, train="new", new=pattern, share=1.0, begin=None, end=None)]


def _parts(context: Context) -> tuple[Batches, Batches]:
    """What is trained on, and what chooses the best state."""
    return split(context.calibration, HELD_OUT, BATCH, 0)
