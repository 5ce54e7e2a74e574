"""The V-cycle: train the large model a little, its coalesced one for long, and the blended large one to the end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....anatomy import Anatomy
from ....data import Batches
from ....errors import TransectError
from ....evaluation.operations import operations_counted
from ....forward import at_rest
from ....statistics import Progress
from ....training import Course, Machine, Problem, Run, Schedule, State, held_out_loss, own_loss, train
from .maps import Levels, check_levels, interpolated, resized


@dataclass(frozen=True)
class Leg:
    """One training of a cycle.

    name: `large`, `small` or `blended`. course: how it went; its held-out losses are in `course.checks`. flops: of a
    step, three times those of the forward pass as they were counted.
    """

    name: str
    course: Course
    flops: float

    @property
    def cost(self) -> float:
        """Floating point operations of all its steps."""
        return self.course.steps * self.flops


def leg(
    model: Any, name: str, training: Batches, held_out: Batches | None, schedule: Schedule, progress: Progress | None
) -> Leg:
    """Train every number of a model, in place, with a fresh optimizer; with held-out data the best state is kept."""
    machine = Machine(str(model.device))
    with operations_counted() as counted, torch.no_grad():
        own_loss(model, next(iter(training)))
    problem = Problem(
        name, dict(model.named_parameters()), list(training), lambda batch: own_loss(model, batch),
        None if held_out is None else lambda: held_out_loss(model, held_out, machine), model.eval,
        [Batches([batch]).tokens for batch in training],
    )  # fmt: skip
    with at_rest(model, frozen=True):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        course = train(problem, Run(schedule, machine, State(None), progress), {})
    return Leg(name, course, 3.0 * counted.get_total_flops())


def v_cycle(
    model: Any,
    training: Batches,
    held_out: Batches | None = None,
    *,
    steps: Sequence[int] = (50, 400, 400),
    rates: Sequence[float] = (1e-3, 2e-3, 1e-3),
    width: int = 2,
    depth: int = 2,
    groups: Any = "halves",
    alpha: float = 0.5,
    seed: int = 0,
    every: int | None = None,
    progress: Progress | None = None,
) -> tuple[Any, list[Leg]]:
    """A model trained over two levels, and its three trainings; the given one is changed by the first of them.

    steps, rates: of the large model, the small one, and the blended one. width, depth, groups: see `Levels`. alpha:
    the share of what the small one gives in the blend; 1 for nothing but that. Batches of a step are those of
    `training`. Two levels: the small model is trained in one go, not in a cycle of its own.
    Raises TransectError, before any training, for sizes that do not divide.
    """
    if len(steps) != 3 or len(rates) != 3:
        raise TransectError("steps and rates should be three each: of the large, the small and the blended model")
    shrink, grow = (Levels(way, width, depth, groups) for way in ("shrink", "grow"))
    check_levels(Anatomy(model), shrink)
    legs: list[Leg] = []

    def trained(one: Any, place: int) -> None:
        schedule = Schedule(
            rates[place], epochs=max(1, steps[place]), steps=steps[place], every=every, seed=seed + place
        )
        name = ("large", "small", "blended")[place]
        legs.append(leg(one, name, training, held_out, schedule, progress))

    trained(model, 0)
    small = resized(Anatomy(model), shrink)
    trained(small, 1)
    grown = resized(Anatomy(small), grow)
    blended = interpolated(copy.deepcopy(model), grown, alpha)
    trained(blended, 2)
    return blended, legs
