"""Training a model, its choices sampled ever more sharply; and running it as it was trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import Diverged
from ....forward.objective import IGNORED
from ....statistics import Progress
from ....training import Check, Machine, Problem, Run, Schedule, State, train
from .model import ProgramModel, Sizes, predicted
from .sampling import gumbel, temperature
from .tasks import Labelled

CHECKS = 50  # times that the training loss is noted
HOT, COLD = 3.0, 0.01  # the first and the last temperature


def fit(
    sizes: Sizes, data: Labelled, *, epochs: int, batch: int, rate: float, seed: int, device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What a trained model is made of, for `ProgramModel.of`, and "training_loss": nats a label, as it went.

    Every choice is one sample of a Gumbel-softmax, whose temperature falls from 3 to 0.01 in equal factors; Adam at a
    constant rate; cross-entropy, the mean over a sequence's labels and then over sequences (the paper's appendix).
    The last step's numbers are kept: before, the temperature has not reached its end. If the loss stops being finite,
    the last training loss is NaN.
    """
    model = ProgramModel(sizes, seed).to(device)
    inputs, targets = data.inputs.to(device), data.targets.to(device)
    per_epoch = math.ceil(len(inputs) / batch)
    losses: list[float] = []
    order = list[Tensor]()  # of the epoch under way

    def loss(number: int) -> tuple[Tensor, int]:
        epoch, position = divmod(problem.at, per_epoch)
        if position == 0 or not order:
            shuffled = torch.randperm(len(inputs), generator=torch.Generator().manual_seed((seed << 20) + epoch))
            order[:] = [shuffled.to(device)]
        rows = order[0][position * batch : (position + 1) * batch]
        sample = gumbel(temperature(problem.at, per_epoch, epochs, HOT, COLD))
        return sequence_losses(model(inputs[rows], sample), targets[rows]).sum(), len(rows)

    def note(check: Check) -> None:
        losses.append(check.loss)

    parameters = {name: one for name, one in model.named_parameters() if one.numel()}
    problem = Problem(f"seed {seed}", parameters, range(per_epoch), loss, None, model.train)
    every = math.ceil(epochs * per_epoch / CHECKS)
    schedule = Schedule(
        rate, epochs=epochs, every=every, warm_up=0, shape="constant", clip=None, shuffle=False, seed=seed
    )
    try:
        train(problem, Run(schedule, Machine(device), State(None), progress, note), {})
    except Diverged:
        losses.append(math.nan)
    return {**model.state_dict(), "training_loss": torch.tensor(losses)}


def sequence_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sequence (B), in nats a label that is asked for, from logits (B, T, labels)."""
    each = functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)


def sampled(model: ProgramModel, ids: Tensor, seed: int) -> Tensor:
    """What the model predicts (N, T) as it was trained last: with samples at the lowest temperature."""
    devices = [model.unit.device] if model.unit.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return predicted(model, ids, gumbel(COLD))
