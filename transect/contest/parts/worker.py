"""Running trials of a contest of parts: what one process does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...data import Batches
from ...errors import Diverged, OutOfReach
from ...evaluation import evaluate_loss, parameters
from ...parts import build_model
from ...store import keep_json
from ...tasks import Drawn, task_named
from ...training import Machine, Problem, Run, Schedule, State, own_loss, train
from ..trials import UNFINISHED
from .plan import Combination, PartsPlan, PartsTrial
from .sizes import fitted, flops_of_model


class PartsWorker:
    """Builds, trains and measures any trial of the plan."""

    def __init__(self, folder: Path, plan: PartsPlan) -> None:
        self.folder, self.plan = folder, plan

    def run(self, trials: Sequence[PartsTrial], on_trial: Callable[[PartsTrial], None]) -> None:
        """Run the trials, and write each as soon as it is there."""
        for trial in trials:
            keep_json(self.folder / trial.file, self.compute(trial), self.plan.of(trial))
            on_trial(trial)

    def compute(self, trial: PartsTrial) -> dict[str, Any]:
        """One trial; what no width makes equal, or what diverges, has a note instead of numbers.

        Seeds of the task that are even are trained on, odd ones are held out: the first to choose the rate, the second
        for the table.
        """
        plan = self.plan
        training, validation, evaluation = (
            self.drawn(seed, count)
            for seed, count in (
                (2 * trial.seed, plan.steps * plan.batch), (1, plan.held_out), (3, plan.held_out)
            )
        )  # fmt: skip
        state = State(self.folder / UNFINISHED / Path(trial.file).stem)
        state.begin(plan.of(trial))
        try:
            model, sizes = self.model(trial.entrant, training, trial.seed)
            model.to(plan.device)
            batches = list(training.batches(plan.batch))
            schedule = Schedule(
                lr=trial.rate, optimizer=plan.optimizer, options=plan.optimizer_options, seed=trial.seed, shuffle=False,
                every=max(1, plan.steps // 5),
            )  # fmt: skip
            problem = Problem(
                str(trial), dict(model.named_parameters()), batches, lambda batch: own_loss(model, batch), None,
                model.train, [Batches([batch]).tokens for batch in batches],
            )  # fmt: skip
            course = train(problem, Run(schedule, Machine(plan.device), state), {"trial": str(trial)})
        except (OutOfReach, Diverged) as reason:
            state.remove()
            return {"note": str(reason)}
        state.remove()
        judged = evaluate_loss(model, evaluation.batches(plan.batch))
        length = training.inputs.shape[1] if not training.images else 1
        return {
            "validation": evaluate_loss(model, validation.batches(plan.batch)).loss, "loss": judged.loss,
            "accuracy": judged.accuracy, "examples": list(judged.examples), "parameters": parameters(model),
            "flops": flops_of_model(model, length), "sizes": sizes, "steps": course.steps, "tokens": course.tokens,
            "seconds": course.seconds, "curve": [[step, loss] for step, loss, _ in course.checks],
            "forward": _forward_seconds(model, batches[0]),
        }  # fmt: skip

    def drawn(self, seed: int, count: int) -> Drawn:
        """Examples of the task."""
        return task_named(self.plan.task).draw(count, seed, self.plan.options)

    def model(self, entrant: Combination, drawn: Drawn, seed: int) -> tuple[Any, dict[str, Any]]:
        """The entrant's model with random weights of that seed, in the sizes that make it equal to the others."""
        sizes = _fitted(self.plan, entrant, drawn)
        parts, settings = _chosen(self.plan, entrant)
        return build_model(self.plan.base, parts=parts, settings=settings, seed=seed, **sizes), sizes


def _chosen(plan: PartsPlan, entrant: Combination) -> tuple[dict[str, str], dict[str, Any]]:
    parts = dict(entrant.parts)
    return parts, {name: plan.settings.get(name, {}) for name in parts.values()}


def _fitted(plan: PartsPlan, entrant: Combination, drawn: Drawn) -> dict[str, Any]:
    """The sizes that make the entrant equal to the others on this task."""
    parts, settings = _chosen(plan, entrant)
    length = 1 if drawn.images else drawn.inputs.shape[1]
    return fitted(plan.base, parts, settings, sizes_for(plan.sizes, drawn), plan.equal, plan.wanted, length)


def sizes_for(sizes: Mapping[str, int | None], drawn: Drawn) -> dict[str, int | None]:
    """The base's sizes, with those that the task decides; images are cut into patches of 2 x 2."""
    if drawn.images:
        channels, side = drawn.inputs.shape[1], drawn.inputs.shape[-1]
        return {**sizes, "classes": drawn.vocabulary, "image": side, "patch": 2, "channels": channels}
    return {**sizes, "vocabulary": drawn.vocabulary, "length": drawn.inputs.shape[1]}


def size_of_first(plan: PartsPlan) -> int:
    """How many parameters the first entrant has in the plan's sizes."""
    parts, settings = _chosen(plan, plan.entrants[0])
    drawn = task_named(plan.task).draw(1, 0, plan.options)
    with torch.device("meta"):
        return parameters(
            build_model(plan.base, parts=parts, settings=settings, seed=0, **sizes_for(plan.sizes, drawn))
        )  # fmt: skip


def check_entrants(plan: PartsPlan) -> None:
    """Raise TransectError, before any training, for a part that does not fit the base or the task."""
    drawn = task_named(plan.task).draw(1, 0, plan.options)
    for entrant in plan.entrants:
        with suppress(OutOfReach):  # which is a note in the table
            _fitted(plan, entrant, drawn)


@torch.no_grad()
def _forward_seconds(model: Any, batch: Any, times: int = 5) -> float:
    """The median time of a forward pass over a batch, in evaluation mode."""
    model.eval()
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        model(**inputs)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def load_parts_worker(folder: Path, plan: PartsPlan) -> PartsWorker:
    """A worker in a fresh process."""
    return PartsWorker(folder, plan)
