"""Claims of layer normalization (Ba, Kiros & Hinton, 2016, arXiv:1607.06450)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...parts import Around, part_named
from ...tasks.registry import task_named
from ..context import Context
from ..descent import descend
from ..pairs import paired
from ..registry import Result, Verdict, claim

PAPER = "arXiv:1607.06450"
HIDDEN, BATCH = 64, 32  # of the cells
STEPS, RATES, SEEDS = 300, (1e-3, 3e-3), (0, 1, 2)
LAST = 30  # steps whose mean loss is what a training came to
MLP_WIDTH, MLP_RATE, EXAMPLES = 128, 1e-3, 12000
BATCHES = (4, 128)
_TRAIN, _TEST = 0, 1  # even and odd seeds draw from what is to be trained on and what is held out


@claim(
    "layer-norm/lstm-learns-sooner",
    method="layer-norm",
    paper=PAPER,
    statement="At the same learning rate an LSTM with layer norms comes to the plain LSTM's last loss in fewer steps.",
)
def lstm_learns_sooner(context: Context) -> Result:
    """Scaled down: a digit row by row, eight pixels a step; its class is said at the end.

    The model plays no part. Data, order, rate and seed are the same for both cells, and 64 units. Not pixel by pixel:
    LN(W x) does not see the length of x, so that of a single number it leaves the sign.
    """
    images, classes = _digits(_TRAIN)
    pixels = images.flatten(1).unflatten(1, (8, 8))
    numbers = []
    for rate in RATES:
        for seed in SEEDS:
            plain, normed = (_cell_losses(pixels, classes, norms, rate, seed) for norms in (False, True))
            reached = mean(plain[-LAST:])
            numbers.append({
                "rate": rate, "seed": seed, "plain_loss": reached, "normed_loss": mean(normed[-LAST:]),
                "plain_steps": _steps_to(plain, reached), "normed_steps": _steps_to(normed, reached),
            })  # fmt: skip
    sooner = [row["normed_steps"] < row["plain_steps"] for row in numbers]
    return Result(
        Verdict.of(all(sooner)),
        f"Sooner in {sum(sooner)} of {len(sooner)} pairs of trainings of {STEPS} steps: to the plain cell's last loss "
        f"in {mean(row['normed_steps'] for row in numbers):.0f} steps against "
        f"{mean(row['plain_steps'] for row in numbers):.0f}, at the mean",
        numbers,
    )


@cache
def _digits(seed: int) -> tuple[Tensor, Tensor]:
    drawn = task_named("digits").draw(4000, seed)
    return drawn.inputs, drawn.answers


def _cell_losses(pixels: Tensor, classes: Tensor, norms: bool, rate: float, seed: int) -> list[float]:
    """The losses of the steps of a training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = part_named("mixer", "ln-lstm").function(8, 1, HIDDEN, True, norms=norms)
        cell.o_proj = nn.Linear(HIDDEN, 10)
    drawn, losses = torch.Generator().manual_seed(seed), []

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(pixels), (BATCH,), generator=drawn)
        found = functional.cross_entropy(cell(pixels[chosen], Around())[:, -1], classes[chosen])
        losses.append(float(found.detach()))
        return found

    descend(cell, loss, STEPS, rate)
    return losses


def _steps_to(losses: list[float], level: float) -> int:
    """The first step whose loss, as the mean of the last ones up to it, is at the level; all of them if none is."""
    for step in range(LAST, len(losses) + 1):
        if mean(losses[step - LAST : step]) <= level:
            return step
    return len(losses)


@claim(
    "layer-norm/small-batches",
    method="layer-norm",
    paper=PAPER,
    statement="An MLP with layer norms is no worse when trained in batches of 4 than in batches of 128; one with batch "
    "norms is.",
)
def small_batches(context: Context) -> Result:
    """Scaled down: digits of 8 x 8 pixels, two hidden layers of 128, as many examples for both sizes of batch.

    Judged by the held-out loss, over seeds; worse is by more than two standard errors of the difference. The model
    plays no part.
    """
    norms: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    numbers, worse = [], {}
    for name, make in norms.items():
        found = {size: [_mlp_loss(make, size, seed) for seed in SEEDS] for size in BATCHES}
        small, large = (found[size] for size in BATCHES)
        difference, error = paired(small, large)
        worse[name] = difference > 2 * error
        numbers.append({
            "norm": name, f"loss_at_{BATCHES[0]}": mean(small), f"loss_at_{BATCHES[1]}": mean(large),
            "difference": difference, "standard_error": error,
        })  # fmt: skip
    holds = not worse["layer"] and worse["batch"]
    told = ", ".join(
        f"{row['norm']} norms {'are' if worse[row['norm']] else 'are not'} worse "
        f"({row[f'loss_at_{BATCHES[0]}']:.3f} against {row[f'loss_at_{BATCHES[1]}']:.3f})"
        for row in numbers
    )
    return Result(
        Verdict.of(holds),
        f"In batches of {BATCHES[0]} against {BATCHES[1]}, {EXAMPLES} examples each, over {len(SEEDS)} seeds: {told}",
        numbers,
    )


def _mlp_loss(make: Callable[[int], nn.Module], size: int, seed: int) -> float:
    """The held-out loss of an MLP that was trained in batches of that size."""
    (pixels, classes), (unseen, answers) = _digits(_TRAIN), _digits(_TEST)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for width in (64, MLP_WIDTH):
            layers += [nn.Linear(width, MLP_WIDTH), make(MLP_WIDTH), nn.ReLU()]
        model: Any = nn.Sequential(*layers, nn.Linear(MLP_WIDTH, 10))
    drawn = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(pixels), (size,), generator=drawn)
        return functional.cross_entropy(model(pixels[chosen]), classes[chosen])

    descend(model, loss, max(1, EXAMPLES // size), MLP_RATE)
    with torch.no_grad():
        return float(functional.cross_entropy(model(unseen), answers))
