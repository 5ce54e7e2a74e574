"""The training loop: steps, held-out loss, and the best state kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TransectError
from ..forward import Batch
from ..statistics import Progress
from .machine import Machine
from .optimizer import Optimizer
from .settings import Settings
from .state import State
from .trained import Parameters


@dataclass
class Course:
    """How a training went.

    before, best: held-out loss at the start and of the best state, which was reached after `best_step` steps.
    checks: [step, mean training loss since the check before, held-out loss]. seconds: of wall clock, over all runs.
    numbers: how many were trained. tokens: positions of the batches that were trained on.
    """

    numbers: int = 0
    before: float = math.nan
    best: float = math.nan
    best_step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    checks: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """What is shown as a training goes: step of steps, mean training loss since the last check, held-out loss."""

    name: str
    step: int
    steps: int
    loss: float
    held_out: float


OnCheck = Callable[[Check], None]


@dataclass(frozen=True)
class Job:
    """What all trainings of one repair have in common.

    settings: resolved. training, held_out: this process's share of every batch; None where it has no part of one.
    tokens: positions of each whole training batch.
    """

    settings: Settings
    machine: Machine
    state: State
    training: Sequence[Batch | None]
    held_out: Sequence[Batch | None]
    tokens: Sequence[int]
    progress: Progress | None
    on_check: OnCheck


@dataclass
class Problem:
    """Something to lower.

    name: for messages. parameters: what may change.
    batches: this process's share of every training batch; None where it has no part of one.
    loss: of such a batch, the summed loss (a scalar) and how many terms it has. measure: the held-out loss.
    set_mode: called before the model is run for gradients.
    """

    name: str
    parameters: Parameters
    batches: Sequence[Any]
    loss: Callable[[Any], tuple[Tensor, int]]
    measure: Callable[[], float]
    set_mode: Callable[[], None]


def train(problem: Problem, job: Job, note: dict[str, Any]) -> Course:
    """Lower the problem's loss; its parameters end with the values that were best on the held-out data.

    They may be those of the start. The same holds after an exception, Ctrl-C included. note: goes into the state;
    only a state with this note is gone on from.
    Raises TransectError if the loss is not finite any more.
    """
    settings, progress = job.settings, job.progress
    assert settings.lr is not None
    per_epoch = math.ceil(len(problem.batches) / settings.accumulate)
    total = settings.epochs * per_epoch if settings.steps is None else min(settings.steps, settings.epochs * per_epoch)
    every = settings.every or math.ceil(total / 10)
    optimizer = Optimizer(problem.parameters, settings.lr, total)
    course = Course(numbers=sum(parameter.numel() for parameter in problem.parameters.values()))
    since = [0.0, 0]  # loss and number of steps since the last check
    saved = job.state.read("state")
    if saved is not None and saved[1]["note"] == note:
        tensors, course = saved[0], Course(**saved[1]["course"])
        optimizer.load(tensors)
        best = {name: tensors[f"best|{name}"] for name in problem.parameters}
    else:
        course.before = course.best = problem.measure()
        if not math.isfinite(course.before):
            raise TransectError(f"{problem.name}: the held-out loss is {course.before} before any repair")
        best = _copied(problem.parameters)
    started = time.perf_counter() - course.seconds
    remaining = range(course.steps, total)
    try:
        for step in progress(remaining, problem.name) if progress else remaining:
            group = _batches_of(step, per_epoch, len(problem.batches), settings)
            with _noise_of(step, settings.seed, job.machine):
                gradients, loss = _gradients(problem, group, job.machine)
            held_out = math.nan
            if math.isfinite(loss):
                optimizer.step(step, gradients)
                course.steps, course.tokens = step + 1, course.tokens + sum(job.tokens[i] for i in group)
                since = [since[0] + loss, since[1] + 1]
                if course.steps % every and course.steps != total:
                    continue
                held_out = problem.measure()
            if not math.isfinite(held_out):
                raise TransectError(
                    f"{problem.name}: the loss is not finite after {step + 1} steps at learning rate "
                    f"{settings.lr:g}; what was best so far (held-out loss {course.best:.4f}) is kept. Lower the rate"
                )
            course.checks.append([course.steps, since[0] / since[1], held_out])
            if held_out < course.best:
                course.best, course.best_step, best = held_out, course.steps, _copied(problem.parameters)
            course.seconds = time.perf_counter() - started
            tensors = optimizer.state() | {f"best|{name}": tensor for name, tensor in best.items()}
            job.state.write("state", tensors, {"note": note, "course": asdict(course)})
            job.on_check(Check(problem.name, course.steps, total, since[0] / since[1], held_out))
            since = [0.0, 0]
    finally:
        with torch.no_grad():
            for name, parameter in problem.parameters.items():
                parameter.copy_(best[name])
                parameter.grad = None
    return course


def _copied(parameters: Parameters) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def _batches_of(step: int, per_epoch: int, count: int, settings: Settings) -> list[int]:
    """Which batches a step is made of: those of an epoch in an order of its own, `accumulate` at a time."""
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed + 1 + epoch)).tolist()
    return order[position * settings.accumulate : (position + 1) * settings.accumulate]


@contextmanager
def _noise_of(step: int, seed: int, machine: Machine) -> Iterator[None]:
    """Random numbers (of dropout) that depend on seed, step and process alone, so that none need to be kept."""
    devices = range(torch.cuda.device_count()) if machine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + machine.index)
        yield


def _gradients(problem: Problem, group: Sequence[int], machine: Machine) -> tuple[dict[str, Tensor], float]:
    """Gradients of the mean loss over a step's batches, in every process the same, and that loss."""
    problem.set_mode()
    summed = torch.zeros(2, dtype=torch.float64)  # the loss, and how many terms it has
    for index in group:
        batch = problem.batches[index]
        if batch is not None:
            with machine.autocast():
                loss, count = problem.loss(batch)
            loss.backward()
            summed += torch.tensor([loss.item(), count], dtype=torch.float64)
    summed = machine.total(summed)
    loss, count = float(summed[0]), max(1.0, float(summed[1]))
    gradients = {}
    for name, parameter in problem.parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wide = gradient.float() if gradient.element_size() < 4 else gradient
        gradients[name] = machine.total(wide) / count
        parameter.grad = None
    return gradients, loss / count
