"""Claims of DMoERM (Quan, 2024, arXiv:2403.01197), on made-up preferences whose truth is known.

All models begin as the same random encoder of two layers, and learn from the same pairs of answers, of which three in
ten name the wrong one. They say nothing of the model that claims are run on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import ceil
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...context import Context
from ...registry import Result, Verdict, claim
from .answers import ASPECTS, CATEGORIES, NOISE, Sizes, answer_of, backbone, pairs_of, prompt_of, worth

if TYPE_CHECKING:
    from ....preference import RewardModel

SIZES = Sizes()
SEEDS = (0, 1)
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH = 32  # pairs in a step
HELD_OUT = 0.25  # a tenth are too few noisy pairs to choose a state by
MIXED, SINGLE, JOINED = "one mixed", "one a category", "aspects of a category"
_CLEAR = 2  # standard errors
_PAPER = "arXiv:2403.01197"


@claim(
    "dmoerm/routed",
    method="dmoerm",
    paper=_PAPER,
    statement="Where tasks conflict, a scorer for each category behind a router says more often than one scorer of all "
    "which of two answers is better.",
)
def routed(context: Context) -> Result:
    """Ours: two categories with opposite signs on one of five aspects. The mixed scorer sees the prompt, too.

    Both train on every pair, in as many passes. Accuracy on pairs without noise, both seeds' together; the standard
    error is over pairs, in pairs of models.
    """
    return _more_accurate(SINGLE, MIXED)


@claim(
    "dmoerm/aspects",
    method="dmoerm",
    paper=_PAPER,
    statement="Under label noise, a scorer that joins experts for aspects says more often which of two answers is "
    "better than a single scorer of the category.",
)
def aspects(context: Context) -> Result:
    """As in the paper the experts have labels for their aspect beside the noisy ones: here exact ones.

    So they are told more than the single scorer, which has all of the noisy pairs for its one phase. Otherwise as
    `dmoerm/routed`.
    """
    return _more_accurate(JOINED, SINGLE)


@claim(
    "dmoerm/best-of-n",
    method="dmoerm",
    paper=_PAPER,
    statement="The true reward of the best of n answers, picked by the aspects together, begins to fall at a larger n "
    "than when a single scorer picks.",
)
def best(context: Context) -> Result:
    """n up to 256, of random answers; expected true reward, mean over prompts, categories and seeds.

    It holds if the single scorer's falls from some n on and the aspects' peak lies at a larger n.
    """
    curves = {name: _mean_curve(name) for name in (SINGLE, JOINED)}
    rows = [
        {"n": n, "kl": kl} | {f"true, {name}": points[place][2] for name, points in curves.items()}
        for place, (n, kl, _) in enumerate(curves[SINGLE])
    ]
    peaks = {name: max(points, key=lambda point: point[2])[0] for name, points in curves.items()}
    told = "; ".join(
        f"{name}: highest {max(point[2] for point in points):.3f} at n = {peaks[name]}, {points[-1][2]:.3f} at n = "
        f"{points[-1][0]}"
        for name, points in curves.items()
    )
    falls = peaks[SINGLE] < curves[SINGLE][-1][0]
    verdict = Verdict.of(falls and peaks[JOINED] > peaks[SINGLE])
    why = "" if falls else " The single scorer's does not fall, so that nothing can fall later."
    return Result(verdict, f"True reward, {told}.{why}", rows)


def _more_accurate(ours: str, other: str) -> Result:
    """Whether one way's accuracy is above the other's."""
    right = {name: torch.cat([_right(name, seed, SIZES) for seed in SEEDS]) for name in (ours, other)}
    difference = right[ours] - right[other]
    gain, error = difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()
    rows: list[dict[str, Any]] = [
        {
            "scorer": name, "accuracy": one.mean().item(),
            **{f"accuracy, {c}": part.mean().item() for c, part in zip(CATEGORIES, _by_category(one), strict=True)},
            "routed right": sum(_routing(name, seed, SIZES) for seed in SEEDS) / len(SEEDS),
        }
        for name, one in right.items()
    ]  # fmt: skip
    told = ", ".join(f"{row['scorer']} {row['accuracy']:.4f}" for row in rows)
    chance = "" if abs(gain) >= _CLEAR * error else f" It is within {_CLEAR} standard errors."
    return Result(
        Verdict.of(gain > 0),
        f"Share of clean pairs that are right: {told}; difference {gain:+.4f}, standard error {error:.4f}.{chance}",
        [*rows, {"scorer": "difference", "accuracy": gain, "standard error": error}],
    )


def _by_category(right: Tensor) -> list[Tensor]:
    """Both seeds' pairs of each category."""
    found = right.view(len(SEEDS), len(CATEGORIES), -1)
    return [found[:, place] for place in range(len(CATEGORIES))]


@cache
def _right(name: str, seed: int, sizes: Sizes) -> Tensor:
    """Of each clean pair, whether the better answer gets more (0 or 1), category after category."""
    model, found = _model(name, seed, sizes), []
    for category in CATEGORIES:
        pairs = pairs_of(category, sizes.judged, 1000 + seed)
        prompts = [pair.prompt for pair in pairs]
        better = model.score(prompts, [pair.better for pair in pairs], batch_size=256)
        found.append((better > model.score(prompts, [pair.worse for pair in pairs], batch_size=256)).double())
    return torch.cat(found)


def _routing(name: str, seed: int, sizes: Sizes) -> float:
    """Share of prompts that go to their category's scorer; all where there is one scorer."""
    model = _model(name, seed, sizes)
    if model.router is None:
        return 1.0
    asked = [(pair.prompt, category) for category in CATEGORIES for pair in pairs_of(category, 100, 2000 + seed)]
    gone = model.route([prompt for prompt, _ in asked])
    right = [model.categories[place] == category for place, (_, category) in zip(gone, asked, strict=True)]
    return sum(right) / len(right)


def _mean_curve(name: str) -> list[tuple[int, float, float]]:
    """(n, KL, true reward) of best of n."""
    from ....preference import curve

    proxies, truths = zip(*(_rewards(name, seed, SIZES) for seed in SEEDS), strict=True)
    sizes = [n for n in NS if n <= SIZES.answers]
    return [(point.n, point.kl, point.true) for point in curve(torch.cat(proxies), torch.cat(truths), sizes)]


@cache
def _rewards(name: str, seed: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(what the model says, the true reward) of answers to prompts of both categories (prompts x answers)."""
    model, generator = _model(name, seed, sizes), Random(f"best of n {seed}")
    proxies, truths = [], []
    for category in CATEGORIES:
        for _ in range(sizes.prompts):
            prompt = prompt_of(generator, category)
            answers = [answer_of(generator) for _ in range(sizes.answers)]
            proxies.append(model.score([prompt] * len(answers), answers, batch_size=512))
            truths.append(torch.tensor([worth(category, answer) for answer in answers]))
    return torch.stack(proxies), torch.stack(truths)


@cache
def _model(name: str, seed: int, sizes: Sizes) -> RewardModel:
    """A trained reward model; the same whichever claim asks."""
    from ....preference import Settings, train_reward_model  # peft takes a second to import
    from ....training import Machine

    pairs = [pair for category in CATEGORIES for pair in pairs_of(category, sizes.pairs, seed, noise=NOISE)]
    if name == MIXED:
        pairs = [replace(pair, category="all") for pair in pairs]
    if name == JOINED:
        asked = [(category, aspect) for category in CATEGORIES for aspect in ASPECTS]
        pairs += [pair for category, aspect in asked for pair in pairs_of(category, sizes.of_aspect, seed, aspect)]
    steps = sizes.epochs * ceil(sizes.pairs / BATCH) * (len(CATEGORIES) if name == MIXED else 1)  # stops routers alone
    settings = Settings(
        rank=8, alpha=16, dropout=0.0, lr=3e-3, aspect_lr=3e-3, router_lr=1e-3, batch_size=BATCH,
        epochs=sizes.epochs, steps=steps, held_out=HELD_OUT, seed=seed,
    )  # fmt: skip
    return train_reward_model(*backbone(seed), pairs, settings, machine=Machine("cpu"))
