"""Claims of model-tuning via prompts (Raman et al., EMNLP 2023, arXiv:2303.07320)."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ....evaluation.attacks import substitution_attack
from ....training import Machine, Problem, Run, Schedule, State, train
from ...context import Context
from ...registry import Result, Verdict, claim
from .grammar import USED, World, pretrained, synonyms, texts, untrained
from .ways import Way, ways

SEEDS = (0, 1, 2)
READ, STEPS = 12_000, 800  # texts that the model has read, and steps of that
TRAINED, HELD_OUT, TESTED = 256, 128, 200  # texts of a classifier
EPOCHS, BATCH = 6, 16
RATES = (3e-4, 1e-3, 3e-3)
MOST = 0.3  # share of a text's words that are exchanged
NEAR = 0.02  # of accuracy, what counts as about the same
_PAPER = "arXiv:2303.07320"


@claim(
    "mvp/substitutions",
    method="mvp",
    paper=_PAPER,
    statement="A classifier from label words at a blank is about as accurate as one with a head on [CLS], and more "
    "accurate when words are exchanged for synonyms.",
)
def exchanged(context: Context) -> Result:
    """On a world of our own, not on your model: see `grammar`.

    A masked model of two layers has read texts in which every word has five synonyms; the classifiers are trained on
    256 texts with two of the six, and attacked with all. Every number is trained; each way at that rate of three that
    is best for it on other such texts, which also choose the state. It holds if the mean robust accuracy over seeds is
    higher, and the clean one at most two points lower. Clean accuracy is on texts of the words that were trained on.
    """
    found = _measured(SEEDS, READ, STEPS, TRAINED, TESTED, EPOCHS, RATES)
    ours, head = found["mvp"], found["head"]
    gain = [one["robust"] - other["robust"] for one, other in zip(ours, head, strict=True)]
    clean = _mean(ours, "clean") - _mean(head, "clean")
    told = (
        f"Robust accuracy {_mean(ours, 'robust'):.3f} against {_mean(head, 'robust'):.3f} of a head (difference "
        f"{statistics.fmean(gain):+.3f}{_error(gain)}), clean {_mean(ours, 'clean'):.3f} against "
        f"{_mean(head, 'clean'):.3f}; before any training mvp is right about {_mean(ours, 'zero-shot'):.3f}."
    )
    holds = statistics.fmean(gain) > 0 and clean >= -NEAR
    return Result(Verdict.of(holds), told, _rows(found))


@claim(
    "mvp/causes",
    method="mvp",
    paper=_PAPER,
    statement="What makes it robust is that the task stays that of pre-training, without random numbers: label words "
    "at [CLS] and a linear head lie between, and without pre-training the advantage vanishes.",
)
def causes(context: Context) -> Result:
    """The same classifiers, also from a model that has read nothing.

    It holds if both lie between mvp and the head in robust accuracy (mean over seeds, ends included), and the gain over
    the head is less than half as large from an untrained model.
    """
    found = _measured(SEEDS, READ, STEPS, TRAINED, TESTED, EPOCHS, RATES)
    robust = {name: _mean(runs, "robust") for name, runs in found.items()}
    gain, without = robust["mvp"] - robust["head"], robust["mvp, untrained"] - robust["head, untrained"]
    between = all(robust["head"] <= robust[name] <= robust["mvp"] for name in ("words at [CLS]", "linear head"))
    told = ", ".join(f"{name} {value:.3f}" for name, value in robust.items())
    holds = between and gain > 0 and without < gain / 2
    explanation = f"Robust accuracy: {told}. Gain over the head {gain:+.3f}, without pre-training {without:+.3f}."
    return Result(Verdict.of(holds), explanation, _rows(found))


Found = Mapping[str, Sequence[Mapping[str, float]]]


@cache
def _measured(
    seeds: tuple[int, ...], read: int, steps: int, trained: int, tested: int, epochs: int, rates: tuple[float, ...]
) -> Found:
    """Of each way, for each seed: clean, robust and zero-shot accuracy, and the rate."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for suffix, world in (("", pretrained(seed, read, steps)), (", untrained", untrained(seed))):
            for name in ways(world, seed):
                run = _one(world, name, seed, trained, tested, epochs, rates)
                found.setdefault(f"{name}{suffix}", []).append(run)
    return found


def _one(
    world: World, name: str, seed: int, trained: int, tested: int, epochs: int, rates: Sequence[float]
) -> dict[str, float]:
    training, chooses, judging = (
        texts(count, 1000 * seed + start, USED) for count, start in ((trained, 1), (HELD_OUT, 2), (tested, 3))
    )
    best: tuple[float, float, Way] | None = None
    for rate in rates:
        way = ways(World(copy.deepcopy(world.model), world.tokenizer), seed)[name]
        held_out = _batches(way, chooses, HELD_OUT)[0]

        def loss(batch: Any, way: Way = way) -> tuple[torch.Tensor, int]:
            losses, _ = way.losses(batch)
            return losses.sum(), len(losses)

        @torch.no_grad()
        def measure(way: Way = way, batch: Any = held_out) -> float:
            return float(way.losses(batch)[0].mean())

        problem = Problem(
            name, dict(way.parameters), _batches(way, training, BATCH), loss=loss, measure=measure,
            set_mode=way.model.eval,  # there is no dropout
        )  # fmt: skip
        course = train(problem, Run(Schedule(rate, epochs=epochs, seed=seed), Machine("cpu"), State(None)), {})
        if best is None or course.best < best[0]:
            best = course.best, rate, way
    assert best is not None
    start = ways(world, seed)[name]
    with torch.no_grad():
        zero = float(start.losses(_batches(start, judging, len(judging))[0])[1].double().mean())
        robust = substitution_attack(
            lambda said: best[2].scores(best[2].encode(said)), [row["text"] for row in judging],
            [row["label"] for row in judging], synonyms(), most=MOST,
        )  # fmt: skip
    return {"rate": best[1], "zero-shot": zero, "clean": robust.clean, "robust": robust.robust}


def _batches(way: Way, rows: Sequence[Mapping[str, Any]], size: int) -> list[dict[str, torch.Tensor]]:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        {**way.encode([row["text"] for row in part]), "labels": torch.tensor([row["label"] for row in part])}
        for part in parts
    ]


def _mean(runs: Sequence[Mapping[str, float]], what: str) -> float:
    return statistics.fmean(run[what] for run in runs)


def _error(values: Sequence[float]) -> str:
    """The standard error over seeds, where there are several."""
    return f", standard error {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""


def _rows(found: Found) -> list[dict[str, Any]]:
    return [
        {"classifier": name} | {what: _mean(runs, what) for what in ("zero-shot", "clean", "robust")}
        | {"robust, by seed": ", ".join(f"{run['robust']:.3f}" for run in runs),
           "rates": ", ".join(f"{run['rate']:g}" for run in runs)}
        for name, runs in found.items()
    ]  # fmt: skip
