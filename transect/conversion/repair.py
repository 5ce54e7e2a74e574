"""The training after a conversion: the stages one after the other, each by the one training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.targets import linear_layers
from ..anatomy import Anatomy
from ..data import Batches
from ..data.split import share
from ..errors import TransectError
from ..forward import Batch
from ..recovery.settings import Settings as LowRank
from ..recovery.trained import add_adapters, merge_adapters
from ..training import (
    Course,
    Machine,
    Parameters,
    Problem,
    Run,
    Schedule,
    distance_from,
    held_out_loss,
    own_loss,
    train,
)
from .stage import Loss, Stage


def repair(
    anatomy: Anatomy, teacher: Any, stages: Sequence[Stage], run: Run, training: Batches, held_out: Batches
) -> list[Course]:
    """Train the model through the stages, in place; how each went.

    run: of all of them; its schedule's learning rate is the stages' where it is not above 0. teacher: the model as it
    was, where a stage needs it. A stage that was finished before is taken from the state.
    """
    machine = run.machine
    ours, judging = share(training, machine.index, machine.count), share(held_out, machine.index, machine.count)
    tokens = [Batches([batch]).tokens for batch in training]
    courses = []
    for number, stage in enumerate(stages):
        schedule = _schedule_of(stage, run.schedule, len(training))
        finished = run.state.read(f"stage-{number:02d}")
        with _during(anatomy, stage, training):
            if finished is not None:
                trained = dict(anatomy.model.named_parameters())
                with torch.no_grad():
                    for name, tensor in finished[0].items():
                        trained[name].copy_(tensor)
                courses.append(Course(**finished[1]))
                continue
            with trainable(anatomy, stage, schedule.seed) as (parameters, changed):
                problem = _problem(anatomy, teacher, stage, parameters, ours, judging, machine, schedule, tokens)
                courses.append(train(problem, replace(run, schedule=schedule), {"stage": number}))
            if run.state.keeps and number + 1 < len(stages):  # low-rank updates are merged by now
                trained = dict(anatomy.model.named_parameters())
                run.state.write(f"stage-{number:02d}", {name: trained[name] for name in changed}, asdict(courses[-1]))
    return courses


@contextmanager
def _during(anatomy: Anatomy, stage: Stage, training: Batches) -> Iterator[None]:
    """What the stage does before it and after it."""
    try:
        if stage.begin is not None:
            stage.begin(anatomy)
        if stage.learn is not None:
            stage.learn(anatomy, training)
        yield
    finally:
        if stage.end is not None:
            stage.end(anatomy)


def _schedule_of(stage: Stage, schedule: Schedule, batches: int) -> Schedule:
    """The user's schedule with the stage's share of the steps, and its rate where the user named none."""
    total = schedule.total(math.ceil(batches / schedule.accumulate))
    steps = max(1, round(stage.share * total)) if stage.share < 1 else schedule.steps
    return replace(schedule, lr=schedule.lr or stage.lr, steps=steps, clip=stage.clip)


@contextmanager
def trainable(anatomy: Anatomy, stage: Stage, seed: int) -> Iterator[tuple[Parameters, list[str]]]:
    """Inside the `with`, the parameters that the stage trains, by name, and the names of those that it changes.

    They are the same but for low-rank updates, which are merged into the weights at its end.
    """
    named = {name: p for name, p in anatomy.model.named_parameters() if p.is_floating_point() and p.numel()}
    blocks: nn.Module = anatomy.block_list
    if stage.train != "lora":
        inside = {id(parameter) for parameter in blocks.parameters()}
        chosen = {
            name: p for name, p in named.items() if (stage.trains(name, stage.new) if stage.new else id(p) in inside)
        }
        if not chosen:
            raise TransectError(f"the stage {stage.name!r} finds nothing to train in the converted model")
        yield _requiring(chosen), list(chosen)
        return
    prefix = next(name for name, module in anatomy.model.named_modules() if module is blocks)
    if stage.roles is None:
        paths = linear_layers(blocks)
    else:
        matrices = anatomy.matrices(stage.roles)
        paths = list(dict.fromkeys(matrix.path.removeprefix(f"{prefix}.") for matrix in matrices))
        dense = set(linear_layers(blocks))
        paths = [path for path in paths if path in dense]
    if not paths:
        raise TransectError(f"the stage {stage.name!r} finds no matrix to train in the converted model")
    settings = LowRank(rank=stage.rank, alpha=stage.alpha, dropout=0.0, seed=seed)
    also = {name: p for name, p in named.items() if stage.trains(name, stage.also)}
    updates = {f"{prefix}.{name}": p for name, p in add_adapters(blocks, sorted(paths), settings).items()}
    try:
        yield updates | _requiring(also), [*(f"{prefix}.{path}.weight" for path in paths), *also]
    finally:
        merge_adapters(blocks)


def _requiring(parameters: Parameters) -> Parameters:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def losses_of(model: Any) -> list[Tensor]:
    """What parts have left in `auxiliary` when they were run last (a balance, a router's target), and no longer."""
    found = []
    for module in model.modules():
        left = module.__dict__.get("auxiliary")
        if left is not None:
            found.append(left)
            module.__dict__["auxiliary"] = None
    return found


def _problem(
    anatomy: Anatomy,
    teacher: Any,
    stage: Stage,
    parameters: Parameters,
    training: Sequence[Batch | None],
    held_out: Sequence[Batch | None],
    machine: Machine,
    schedule: Schedule,
    tokens: list[int],
) -> Problem:
    model, total = anatomy.model, schedule.total(math.ceil(len(training) / schedule.accumulate))

    def once(batch: Batch) -> tuple[Tensor, float]:
        if stage.loss is not None:
            return stage.loss(model, teacher, batch)
        return own_loss(model, batch) if stage.lowers == "own" else distance_from(teacher, model, batch, 1.0)

    def loss(batch: Batch) -> tuple[Tensor, float]:
        if stage.step is not None:
            stage.step(anatomy, problem.at, total)
        losses_of(model)  # those of an earlier run
        found = []
        for way in [nullcontext()] if stage.within is None else stage.within(anatomy, True):
            with way:
                found.append(once(batch))
        return torch.stack([summed for summed, _ in found]).sum(), found[0][1]

    def penalty(batch: Batch) -> Tensor | None:
        left = losses_of(model)
        return torch.stack([one.float() for one in left]).sum() * stage.auxiliary if left and stage.auxiliary else None

    def measure() -> float:
        if stage.measured is not None:
            stage.measured(anatomy)
        found = []
        for way in [nullcontext()] if stage.within is None else stage.within(anatomy, False):
            with way:
                once = held_out_loss(model, held_out, machine) if stage.judged is None else _judged(stage.judged)
                found.append(once)
        return sum(found) / len(found)

    @torch.no_grad()
    def _judged(of: Loss) -> float:
        set_mode()
        summed = torch.zeros(2, dtype=torch.float64)
        for batch in held_out:
            if batch is not None:
                loss, count = of(model, teacher, batch)
                summed += torch.tensor([float(loss), count], dtype=torch.float64)
        total, count = machine.total(summed).tolist()
        model.eval()
        return total / count if count else math.nan

    def set_mode() -> None:
        """Parts know that they are trained (routers, losses of their own); the model's own dropout stays off."""
        model.eval()
        for module in model.modules():
            if hasattr(module, "slot"):
                module.train()

    problem = Problem(
        stage.name, parameters, training, loss, measure, set_mode, tokens, penalty=penalty,
        keeps_last=stage.keeps == "last", rates=stage.rates_of(parameters),
    )  # fmt: skip
    return problem
