"""The training loop: steps, held-out loss, the best state kept, and all of it resumable bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged, TransectError
from ..statistics import Progress
from .machine import Machine
from .schedule import Schedule
from .spill import Spill
from .state import State
from .stepper import Stepper

Parameters = dict[str, nn.Parameter]
_HELD, _BEST = "held|", "best|"


@dataclass
class Course:
    """How a training went.

    before, best: held-out loss at the start and of the best state, which was reached after `best_step` steps.
    checks: [step, mean training loss since the check before, held-out loss]. seconds: of wall clock, over all runs.
    numbers: how many were trained. tokens: positions of the batches that were trained on. optimizer_bytes: of what the
    optimizer holds besides the numbers themselves.
    """

    numbers: int = 0
    before: float = math.nan
    best: float = math.nan
    best_step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimizer_bytes: int = 0
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
class Run:
    """What does not depend on the problem: how long, where, and what is told and kept meanwhile."""

    schedule: Schedule
    machine: Machine
    state: State
    progress: Progress | None = None
    on_check: OnCheck = lambda check: None


@dataclass
class Problem:
    """Something to lower.

    name: for messages. parameters: what may change, by name.
    batches: this process's share of every training batch; None where it has no part of one.
    loss: of such a batch, the summed loss (a scalar) and how many terms it has (their weights' sum, if they have any).
    measure: the held-out loss. Without one nothing is measured, and the parameters end as the last step leaves them.
    set_mode: called before the model is run for gradients.
    tokens: positions of every whole training batch, to be counted.
    penalty: what is added to the mean loss of a batch, after `loss` has run on it; a scalar, or None for nothing.
    after_step: called with the number of steps done and the optimizer, such as for what chooses anew what is trained.
    rates: factors of the learning rate, by the parameter's name; 1 where there is none.
    renew: gives new ones in their place, before the first step and every `renew_every` steps (0: every epoch).
    held: further tensors that go with the parameters as they are now, such as which entries of a matrix they stand for.
    put_back: takes what `held` once gave.
    keeps_last: whether the parameters end as the last step leaves them, whatever the held-out loss says.
    at: how many steps are done, which the loop keeps.
    """

    name: str
    parameters: Parameters
    batches: Sequence[Any]
    loss: Callable[[Any], tuple[Tensor, float]]
    measure: Callable[[], float] | None
    set_mode: Callable[[], object]
    tokens: Sequence[int] = ()
    penalty: Callable[[Any], Tensor | None] | None = None
    after_step: Callable[[int, torch.optim.Optimizer], None] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    renew: Callable[[], Mapping[str, float]] | None = None
    renew_every: int = 0
    held: Callable[[], Mapping[str, Tensor]] = dict
    put_back: Callable[[Mapping[str, Tensor]], None] = lambda tensors: None
    keeps_last: bool = False
    at: int = 0

    def now(self) -> dict[str, Tensor]:
        """Everything that the training changes, itself and no copy."""
        tensors = {**self.parameters, **{f"{_HELD}{name}": tensor for name, tensor in self.held().items()}}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Make everything again as `now` once gave it."""
        self.put_back({k.removeprefix(_HELD): tensor for k, tensor in tensors.items() if k.startswith(_HELD)})
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            parameter.grad = None


def train(problem: Problem, run: Run, note: Mapping[str, Any]) -> Course:
    """Lower the problem's loss; its parameters end with the values that were best on the held-out data.

    They may be those of the start. The same holds after an exception, Ctrl-C included. note: goes into the state;
    only a state with this note is gone on from.
    Raises Diverged if the loss is not finite any more.
    """
    schedule, progress = run.schedule, run.progress
    per_epoch = math.ceil(len(problem.batches) / schedule.accumulate)
    total = schedule.total(per_epoch)
    every = schedule.every or math.ceil(total / 10)
    stepper = Stepper(problem.parameters, schedule, total, problem.rates)
    course = Course(numbers=sum(parameter.numel() for parameter in problem.parameters.values()))
    since = [0.0, 0]  # loss and number of steps since the last check
    best = Spill(run.state.place)
    saved = run.state.read("state")
    if saved is not None and saved[1]["note"] == note:
        tensors, course = saved[0], Course(**saved[1]["course"])
        best.put(_with(_BEST, tensors))
        problem.put_back(_with(_HELD, tensors))
        stepper.load(tensors)
    else:
        if problem.measure is not None:
            course.before = course.best = problem.measure()
            if not math.isfinite(course.before):
                raise TransectError(f"{problem.name}: the held-out loss is {course.before} before any training")
        best.put(problem.now())
    started = time.perf_counter() - course.seconds
    remaining = range(course.steps, total)
    try:
        for step in progress(remaining, problem.name) if progress else remaining:
            if problem.renew is not None and step % (problem.renew_every or per_epoch) == 0:
                stepper.set_rates(problem.renew())
            group = _batches_of(step, per_epoch, len(problem.batches), schedule)
            problem.at = step
            with _noise_of(step, schedule.seed, run.machine):
                gradients, loss = _gradients(problem, group, run.machine)
            held_out, finite = math.nan, math.isfinite(loss)
            if finite:
                stepper.step(step, gradients)
                del gradients  # or they would lie beside the next ones
                if problem.after_step is not None:
                    problem.after_step(step + 1, stepper.optimizer)
                course.steps = step + 1
                course.tokens += sum(problem.tokens[i] for i in group) if problem.tokens else 0
                since = [since[0] + loss, since[1] + 1]
                if course.steps % every and course.steps != total:
                    continue
                if problem.measure is not None:
                    held_out = problem.measure()
                    finite = math.isfinite(held_out)
            if not finite:
                told = f"; what was best so far (held-out loss {course.best:.4f}) is kept" if problem.measure else ""
                raise Diverged(
                    f"{problem.name}: the loss is not finite after {step + 1} steps at learning rate "
                    f"{schedule.lr:g}{told}. Lower the rate"
                )
            course.checks.append([course.steps, since[0] / since[1], held_out])
            if problem.measure is None or problem.keeps_last or held_out < course.best:
                best.put(problem.now())
                course.best, course.best_step = held_out, course.steps
            course.seconds, course.optimizer_bytes = time.perf_counter() - started, stepper.state_bytes
            if run.state.keeps:
                tensors = stepper.state() | {f"{_BEST}{name}": tensor for name, tensor in best.items()}
                tensors |= {f"{_HELD}{name}": tensor for name, tensor in problem.held().items()}
                run.state.write("state", tensors, {"note": note, "course": asdict(course)})
            run.on_check(Check(problem.name, course.steps, total, since[0] / since[1], held_out))
            since = [0.0, 0]
    finally:
        problem.restore(best)
    return course


def _with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _batches_of(step: int, per_epoch: int, count: int, schedule: Schedule) -> list[int]:
    """Which batches a step is made of: those of an epoch in an order of its own, `accumulate` at a time."""
    epoch, position = divmod(step, per_epoch)
    order = list(range(count))
    if schedule.shuffle:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(schedule.seed + 1 + epoch)).tolist()
    return order[position * schedule.accumulate : (position + 1) * schedule.accumulate]


@contextmanager
def _noise_of(step: int, seed: int, machine: Machine) -> Iterator[None]:
    """Random numbers (of dropout) that depend on seed, step and process alone, so that none need to be kept."""
    devices = range(torch.cuda.device_count()) if machine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + machine.index)
        yield


def _gradients(problem: Problem, group: Sequence[int], machine: Machine) -> tuple[dict[str, Tensor], float]:
    """Gradients of the mean loss over a step's batches, in every process the same, and that loss, penalties left out.

    A penalty weighs as its batch does.
    """
    problem.set_mode()
    summed = torch.zeros(2, dtype=torch.float64)  # the loss, and how many terms it has
    for index in group:
        batch = problem.batches[index]
        if batch is not None:
            with torch.enable_grad(), machine.autocast():
                loss, count = problem.loss(batch)
                penalty = None if problem.penalty is None else problem.penalty(batch)
                lowered = loss if penalty is None else loss + count * penalty.to(loss)
            lowered.backward()
            summed += torch.tensor([loss.item(), count], dtype=torch.float64)
    summed = machine.total(summed)
    loss, count = float(summed[0]), float(summed[1]) or 1.0
    gradients = {}
    for name, parameter in problem.parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wide = gradient.float() if gradient.element_size() < 4 else gradient
        gradients[name] = machine.total(wide).div_(count)
        parameter.grad = None
    return gradients, loss / count
