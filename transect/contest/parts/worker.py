"""Running trials of a contest of parts: what one process does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import Diverged, OutOfReach, TransectError
from ...evaluation import parameters
from ...forward.objective import task_of
from ...store import keep_json
from ...tasks import Drawn, task_named
from ...training import Machine, Problem, Run, Schedule, State, train
from ..trials import UNFINISHED
from .judging import Watch, judged, loss_on, means_over, scores_of
from .plan import Combination, PartsPlan, PartsTrial, SpeedTrial
from .sizes import built, fitted, flops_of_model
from .speeds import speed_at

_CHECKS = 10  # times that a training is looked at


class PartsWorker:
    """Builds, trains and measures any trial of the plan."""

    def __init__(self, folder: Path, plan: PartsPlan) -> None:
        self.folder, self.plan = folder, plan
        self.drawn = lru_cache(maxsize=4)(self._drawn)  # entrants and rates share them

    def run(self, trials: Sequence[PartsTrial | SpeedTrial], on_trial: Callable[[Any], None]) -> None:
        """Run the trials, and write each as soon as it is there."""
        for trial in trials:
            result = self.speed(trial) if isinstance(trial, SpeedTrial) else self.compute(trial)
            keep_json(self.folder / trial.file, result, self.plan.of(trial))
            on_trial(trial)

    def compute(self, trial: PartsTrial) -> dict[str, Any]:
        """One trial; what no width makes equal, or what diverges, has a note instead of numbers.

        Seeds of the task that are even are trained on, odd ones are held out: the first to choose the rate, the second
        for the table.
        """
        plan, asked = self.plan, task_named(self.plan.task)
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
            every = max(1, plan.steps // _CHECKS)
            schedule = Schedule(
                lr=trial.rate, optimizer=plan.optimizer, options=plan.optimizer_options, seed=trial.seed, shuffle=False,
                every=every,
            )  # fmt: skip
            watch = Watch(model, validation, plan.batch, every, len(batches))
            problem = Problem(
                str(trial), dict(model.named_parameters()), batches, loss_on(model, training), None, model.train,
                [0 if training.images else batch["labels"].numel() for batch in batches], after_step=watch.after_step,
                held=watch.held, put_back=watch.put_back,
            )  # fmt: skip
            course = train(problem, Run(schedule, Machine(plan.device), state), {"trial": str(trial)})
            chosen, found = (judged(model, drawn, plan.batch) for drawn in (validation, evaluation))
        except (OutOfReach, Diverged) as reason:
            state.remove()
            return {"note": str(reason)}
        state.remove()
        by = {} if evaluation.over is None else means_over(evaluation, scores_of(model, evaluation, plan.batch))
        scores = asked.asks(model, **plan.options) if asked.asks is not None else {}
        length = training.inputs.shape[1] if not training.images else 1
        return {
            "validation": chosen.loss, "loss": found.loss, "accuracy": found.accuracy, "by": by, "scores": dict(scores),
            "parameters": parameters(model), "flops": flops_of_model(model, length), "sizes": sizes,
            "steps": course.steps, "tokens": course.tokens, "seconds": course.seconds - watch.seconds,
            "curve": [
                [step, loss, *seen] for (step, loss, _), seen in zip(course.checks, watch.seen, strict=True)
            ],
            "forward": _forward_seconds(model, batches[0]),
        }  # fmt: skip

    def speed(self, trial: SpeedTrial) -> dict[str, Any]:
        """The measurement; with a note instead of numbers where there are none to be had."""
        plan = self.plan
        drawn = task_named(plan.task).draw(1, 0, plan.options)
        parts, settings = _chosen(plan, trial.entrant)
        try:
            sizes = {**_fitted(plan, trial.entrant, drawn)}
        except OutOfReach as reason:
            return {"note": str(reason)}
        return speed_at(
            lambda length: built(plan.base, parts, settings, {**sizes, "length": length}), trial.length, plan.device
        )

    def _drawn(self, seed: int, count: int) -> Drawn:
        """Examples of the task."""
        return task_named(self.plan.task).draw(count, seed, self.plan.options)

    def model(self, entrant: Combination, drawn: Drawn, seed: int) -> tuple[Any, dict[str, Any]]:
        """The entrant's model with random weights of that seed, in the sizes that make it equal to the others."""
        sizes = _fitted(self.plan, entrant, drawn)
        return built(self.plan.base, *_chosen(self.plan, entrant), sizes, drawn.vectors, seed), sizes


def _chosen(plan: PartsPlan, entrant: Combination) -> tuple[dict[str, str], dict[str, Any]]:
    parts = dict(entrant.parts)
    return parts, {name: plan.settings.get(name, {}) for name in parts.values()}


def _fitted(plan: PartsPlan, entrant: Combination, drawn: Drawn) -> dict[str, Any]:
    """The sizes that make the entrant equal to the others on this task."""
    parts, settings = _chosen(plan, entrant)
    length = 1 if drawn.images else drawn.inputs.shape[1]
    sizes = sizes_for(plan.sizes, drawn)
    return fitted(plan.base, parts, settings, sizes, plan.equal, plan.wanted, length, drawn.vectors)


def sizes_for(sizes: Mapping[str, int | None], drawn: Drawn) -> dict[str, int | None]:
    """The base's sizes, with those that the task decides; images are cut into patches of 2 x 2."""
    if drawn.images:
        channels, side = drawn.inputs.shape[1], drawn.inputs.shape[-1]
        return {**sizes, "classes": drawn.vocabulary, "image": side, "patch": 2, "channels": channels}
    return {**sizes, "vocabulary": drawn.vocabulary, "length": drawn.inputs.shape[1]}


def size_of_first(plan: PartsPlan) -> int:
    """How many parameters the first entrant has in the plan's sizes."""
    drawn = task_named(plan.task).draw(1, 0, plan.options)
    return parameters(_skeleton(plan, plan.entrants[0], drawn))


def check_entrants(plan: PartsPlan) -> None:
    """Raise TransectError, before any training, for a part that does not fit the base or the task."""
    drawn = task_named(plan.task).draw(1, 0, plan.options)
    if not drawn.images and task_of(_skeleton(plan, plan.entrants[0], drawn)) != "causal":
        raise TransectError(
            f"{plan.task} is of sequences, which a model continues, such as llama or gpt2; a {plan.base} sees the "
            "answers"
        )
    for entrant in plan.entrants:
        with suppress(OutOfReach):  # which is a note in the table
            _fitted(plan, entrant, drawn)


def _skeleton(plan: PartsPlan, entrant: Combination, drawn: Drawn) -> Any:
    """The entrant's model in the plan's sizes, without numbers."""
    with torch.device("meta"):
        return built(plan.base, *_chosen(plan, entrant), sizes_for(plan.sizes, drawn), drawn.vectors)


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
