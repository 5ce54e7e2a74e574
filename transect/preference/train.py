"""A reward model from preferences: for each category base, aspects and aggregator, and the router of the prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..anatomy import model_in
from ..compression.fingerprint import computation_fingerprint
from ..data import load_preferences
from ..data.encoded import pair_batches, prompt_batches
from ..data.loading import length_for
from ..errors import TransectError
from ..forward import Batch
from ..statistics import Progress
from ..training import Course, Machine, OnCheck, Problem, Run, State, train
from ..version import __version__
from . import phases
from .arranged import Arranged, Halves, arranged, prompts_of
from .reward_model import RewardModel
from .scorer import Router, Scorer, aspect_targets
from .settings import Settings


def train_reward_model(
    model: Any,
    tokenizer: Any,
    data: Any,
    settings: Settings | None = None,
    *,
    categories: Sequence[str] | None = None,
    aspects: Sequence[str] | None = None,
    sequence_length: int | None = None,
    machine: Machine | None = None,
    state: State | None = None,
    progress: Progress | None = None,
    on_check: OnCheck = lambda check: None,
) -> RewardModel:
    """Train a scorer for each category, and a router if there are several.

    model: a Hugging Face model, which is copied for each of them and stays as it is. data: see `load_preferences`.
    Pairs without an aspect train backbone and aggregator (of different prompts), those with one its adapter. A category
    of which no pair has an aspect gets backbone and value head alone.
    categories: those that there must be; by default those of the data. aspects: those that every category must have; by
    default each has those of its own data. state: where unfinished work is kept; the same call goes on from there.
    The result's `training` has the settings, and of each phase (by name) its loss on held-out pairs before and after,
    which state was kept, how many numbers were trained, steps and seconds.

    Raises BadData, before any training, for an unknown category or aspect, for one without data, and where there are
    too few prompts; Diverged if a loss is not finite any more.
    """
    settings, model = (settings or Settings()).resolved(), model_in(model)
    if model.dtype == torch.float16:
        raise TransectError("small gradients vanish in float16: open the model in bfloat16 or float32 (dtype, --dtype)")
    pairs = load_preferences(data, categories=categories, aspects=aspects)
    parts = arranged(pairs, settings, categories, aspects)
    if any(one.aspects for one in parts.values()):
        aspect_targets(model, settings.roles, settings.lora)  # an error now, and not after the first phase
    length = length_for(sequence_length, model, tokenizer)
    machine, state = machine or Machine(), state or State(None)
    plan = {
        "transect": __version__, "preference": settings.to_dict(), "length": length, "machine": machine.to_dict(),
        "pairs": [list(asdict(pair).values()) for pair in pairs], "model": computation_fingerprint(model),
        "parts": {name: list(one.aspects) for name, one in parts.items()},
    }  # fmt: skip
    state.begin(json.dumps(plan, sort_keys=True))
    machine.wait()
    run = Run(settings.schedule(settings.lr), machine, state, progress, on_check)
    job = _Job(model, tokenizer, settings, length, machine, run)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        scorers = [job.scorer(name, one) for name, one in parts.items()]
        router = job.router(parts) if len(parts) > 1 else None
    machine.wait()
    told = {"settings": settings.to_dict(), "phases": {name: _told(course) for name, course in job.courses.items()}}
    return RewardModel(tuple(parts), scorers, router, tokenizer, length, told)


@dataclass
class _Job:
    """What all phases have in common."""

    model: Any
    tokenizer: Any
    settings: Settings
    length: int
    machine: Machine
    run: Run
    courses: dict[str, Course] = field(default_factory=dict)

    def scorer(self, name: str, parts: Arranged) -> Scorer:
        """One category's, trained."""
        settings, machine = self.settings, self.machine
        scorer = Scorer(copy.deepcopy(self.model)).to(machine.device)
        self._train(phases.base(scorer, self._batches(parts.base), machine, f"{name}, base"), settings.lr)
        if parts.aggregator is not None:
            scorer.add_aspects(list(parts.aspects), settings.roles, settings.lora)
            for number, (aspect, halves) in enumerate(parts.aspects.items()):
                problem = phases.aspect(scorer, number, self._batches(halves), machine, f"{name}, {aspect}")
                self._train(problem, settings.aspect_lr)
            scorer.add_aggregator()
            batches = self._batches(parts.aggregator)
            problem = phases.aggregator(scorer, batches, machine, f"{name}, aggregator")
            self._train(problem, settings.aggregator_lr)
        return scorer.to(self.model.device).eval()

    def router(self, parts: dict[str, Arranged]) -> Router:
        """The classifier of prompts, trained."""
        router = Router(copy.deepcopy(self.model), len(parts)).to(self.machine.device)
        batches = [
            prompt_batches(*part, self.tokenizer, self.model, self.length, self.settings.batch_size)
            for part in prompts_of(parts, self.settings)
        ]
        self._train(phases.router(router, (batches[0], batches[1]), self.machine, "router"), self.settings.router_lr)
        return router.to(self.model.device).eval()

    def _batches(self, halves: Halves) -> tuple[Sequence[Batch], Sequence[Batch]]:
        training, held_out = (
            pair_batches(half, self.tokenizer, self.model, self.length, self.settings.batch_size) for half in halves
        )
        return training, held_out

    def _train(self, problem: Problem, lr: float) -> None:
        """Train one phase, or take it from the state if it was finished before."""
        file = f"phase-{len(self.courses):03d}"
        finished = self.run.state.read(file)
        if finished is not None:
            problem.restore(finished[0])
            self.courses[problem.name] = Course(**finished[1])
            return
        run = replace(self.run, schedule=self.settings.schedule(lr))
        self.courses[problem.name] = train(problem, run, {"phase": problem.name})
        self.run.state.write(file, problem.now(), asdict(self.courses[problem.name]))


def _told(course: Course) -> dict[str, Any]:
    """How a phase went, as JSON."""
    return {
        "loss_before": course.before, "loss_after": course.best,
        "kept": f"step {course.best_step}" if course.best_step else "start", "trained": course.numbers,
        "steps": course.steps, "seconds": round(course.seconds, 3),
    }  # fmt: skip
