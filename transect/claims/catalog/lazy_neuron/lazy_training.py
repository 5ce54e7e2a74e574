"""Claims of the lazy neuron study (Li et al. 2023, arXiv:2210.06313) about training.

They train small ReLU classifiers of their own on made-up data (see `relu_classifier`), which takes a minute or two
each, and say nothing about the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from ...context import Context
from ...registry import Result, Verdict, claim
from .relu_classifier import STEPS, Examples, accuracy, calibration_error, densities, mixture, trained, untrained

PAPER = "arXiv:2210.06313"
SEEDS = (0, 1, 2)
NEURONS, WIDTHS = 512, (64, 128, 256, 512, 1024)  # of an MLP
NOISE = 0.4  # share of training labels that are drawn anew
SCATTER = 0.5  # Gaussian noise on test inputs
OWN = "This is about small classifiers that the claim trains, not about the model under study."
FAR = "The paper's large models have a few percent; these stay near a half, so the effect is weak here."


@claim(
    "lazy-neuron/width",
    method="lazy-neuron",
    paper=PAPER,
    statement="In wider MLPs a smaller share of the neurons is active after training, but more of them in number.",
)
def width(context: Context) -> Result:
    """ReLU classifiers of several widths, alike in all else, on data that they were not trained on.

    Both must change in the stated direction at every doubling, in the mean over seeds and MLPs. The model under
    study is not looked at.
    """
    rows = []
    for neurons in WIDTHS:
        active, right, before = [], [], []
        for seed in SEEDS:
            training, test = mixture(seed)
            model = trained(neurons, seed, training)
            active.append(densities(model, test).mean())
            before.append(densities(untrained(neurons, seed), test).mean())
            right.append(accuracy(model, test))
        share = float(torch.stack(active).mean())
        rows.append(
            {
                "neurons": neurons, "active": share, "active neurons": share * neurons,
                "active before training": float(torch.stack(before).mean()), "accuracy": sum(right) / len(SEEDS),
            }
        )  # fmt: skip
    pairs = list(pairwise(rows))
    fewer = sum(wider["active"] < one["active"] for one, wider in pairs)
    more = sum(wider["active neurons"] > one["active neurons"] for one, wider in pairs)
    first, last = rows[0], rows[-1]
    return Result(
        Verdict.of(fewer == more == len(pairs)),
        f"From {first['neurons']} to {last['neurons']} neurons the active share goes from {first['active']:.1%} to "
        f"{last['active']:.1%}, their number from {first['active neurons']:.0f} to {last['active neurons']:.0f}. "
        f"The share falls at {fewer} and the number rises at {more} of {len(pairs)} doublings (mean over "
        f"{len(SEEDS)} seeds). {weak(last['active'])}{OWN}",
        rows,
    )


@claim(
    "lazy-neuron/labels",
    method="lazy-neuron",
    paper=PAPER,
    statement="Training on random labels makes activations sparse too: fewer than half of the neurons are active "
    "in every layer, and fewer than before training.",
)
def labels(context: Context) -> Result:
    """ReLU classifiers trained on labels that say nothing about the inputs, beside ones with the right labels.

    Judged on the random labels alone, in every MLP and for every seed. The model under study is not looked at.
    """
    rows, holds = [], True
    for name, noise in (("right", 0.0), ("random", 1.0)):
        for seed in SEEDS:
            training, test = mixture(seed, noise)
            model = trained(NEURONS, seed, training)
            after, before = densities(model, test), densities(untrained(NEURONS, seed), test)
            holds &= noise == 0 or bool(((after < 0.5) & (after < before)).all())
            rows += [
                {
                    "labels": name, "seed": seed, "layer": layer, "active": float(after[layer]),
                    "active before training": float(before[layer]), "training accuracy": accuracy(model, training),
                }
                for layer in range(len(after))
            ]  # fmt: skip
    mean = {name: mean_over(rows, "active", labels=name) for name in ("right", "random")}
    worst = max(row["active"] for row in rows if row["labels"] == "random")
    return Result(
        Verdict.of(holds),
        f"After {STEPS} steps on random labels {mean['random']:.1%} of the neurons are active, at most {worst:.1%} "
        f"in a layer; with the right labels {mean['right']:.1%}; before training "
        f"{mean_over(rows, 'active before training'):.1%}. {weak(mean['random'])}{OWN}",
        rows,
    )


@claim(
    "lazy-neuron/top-k",
    method="lazy-neuron",
    paper=PAPER,
    statement="Trained with only the largest eighth of each MLP's activations, a classifier is as accurate within "
    "a point, more accurate where 40 % of the training labels are noise, and no worse calibrated.",
)
def sparse(context: Context) -> Result:
    """Top-k against ordinary ReLU classifiers from the same seeds, data and order; means over the seeds decide.

    Calibration is compared for the models trained on clean labels, as the rest is measured on clean test data.
    Accuracy under Gaussian noise on the inputs is reported too. The model under study is not looked at.
    """
    rows = []
    for noise in (0.0, NOISE):
        for seed in SEEDS:
            training, test = mixture(seed, noise)
            for name, k in (("all", None), ("largest eighth", NEURONS // 8)):
                measured = scores(k, seed, training, test)
                rows.append({"neurons": name, "label noise": noise, "seed": seed} | measured)
    ours, dense = (
        {
            (noise, what): mean_over(rows, what, neurons=name, **{"label noise": noise})
            for noise in (0.0, NOISE) for what in ("accuracy", "noisy inputs", "ECE")
        }
        for name in ("largest eighth", "all")
    )  # fmt: skip
    kept = ours[0, "accuracy"] >= dense[0, "accuracy"] - 0.01
    robust = ours[NOISE, "accuracy"] > dense[NOISE, "accuracy"]
    calibrated = ours[0, "ECE"] <= dense[0, "ECE"]
    told = [
        f"{what} {ours[key]:.4f} against {dense[key]:.4f} of the ordinary ones"
        for what, key in (
            ("Accuracy", (0, "accuracy")), ("with label noise", (NOISE, "accuracy")),
            ("calibration error", (0, "ECE")), ("with label noise", (NOISE, "ECE")),
            (f"accuracy with Gaussian noise of {SCATTER:g} on the inputs", (0, "noisy inputs")),
        )
    ]  # fmt: skip
    return Result(
        Verdict.of(kept and robust and calibrated),
        f"{'; '.join(told)} (means over {len(SEEDS)} seeds). {OWN}",
        rows,
    )


def weak(active: float) -> str:
    """A word of caution where more than a quarter of the neurons is still active (our threshold)."""
    return f"{FAR} " if active > 0.25 else ""


def scores(k: int | None, seed: int, training: Examples, test: Examples) -> dict[str, float]:
    """What a classifier with the k largest activations is worth on the test data."""
    model = trained(NEURONS, seed, training, k)
    return {
        "accuracy": accuracy(model, test), "noisy inputs": accuracy(model, test, SCATTER),
        "ECE": calibration_error(model, test), "training accuracy": accuracy(model, training),
    }  # fmt: skip


def mean_over(rows: Sequence[Mapping[str, Any]], what: str, **where: Any) -> float:
    """Mean of a number over the rows that have these entries."""
    chosen = [row[what] for row in rows if all(row[key] == value for key, value in where.items())]
    return sum(chosen) / len(chosen)
