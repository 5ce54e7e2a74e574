"""Claims of weight matching (Ainsworth et al. 2023, arXiv:2209.04836; Ito et al. 2025, arXiv:2402.04051)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...merging import Matched, curve_of, curve_of_module, match_chain, spectral_alignment
from ...merging.matching import distance, match
from ...merging.registry import tensors_of
from ...merging.units import units_of
from ..context import Context
from ..digit_networks import digit_accuracy, digit_images, digit_loss, network, train_digits
from ..on_text import held_out
from ..parts_from_scratch import trained_from_scratch
from ..registry import Result, Verdict, claim

REBASIN, ANALYSIS = "arXiv:2209.04836", "arXiv:2402.04051"
STEPS = 400  # of each network on digits
WIDTHS = (32, 128, 512)
POINTS = 25
LANGUAGE_STEPS, LANGUAGE_POINTS = 300, 5
FAR = 0.5  # of the barrier before: a barrier that is below is far below


@dataclass
class Study:
    """Three networks of one width and different seeds, the last two also as they lie beside the first."""

    width: int
    models: list[nn.Sequential]
    moved: list[nn.Sequential]
    done: list[Matched]

    def barrier(self, one: nn.Module, other: nn.Module) -> float:
        """On the held-out digits, in nats."""
        held = digit_images()[1]
        return curve_of_module(one, other, lambda model: digit_loss(model, held), POINTS).barrier

    def alignment(self, other: nn.Sequential, least: float) -> float:
        """With the first network."""
        return spectral_alignment(zip(_matrices(self.models[0]), _matrices(other), strict=True), least)


def _matrices(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]


def _numbers(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@lru_cache
def _study(width: int, steps: int) -> Study:
    models = [train_digits(network((64, width, width, 10), seed), steps, seed) for seed in range(3)]
    found = [match_chain(models[0], other) for other in models[1:]]
    return Study(width, models, [moved for moved, _ in found], [done for _, done in found])


@claim(
    "weight-matching/barrier",
    method="weight-matching",
    paper=REBASIN,
    statement="Between two transformers trained from different seeds, matching takes away most of the loss barrier.",
)
def barrier(context: Context) -> Result:
    """Small Llamas from scratch, with data in another order too; the paper's networks are no transformers."""
    models = [trained_from_scratch(context, LANGUAGE_STEPS, seed) for seed in (0, 1)]
    first, second = map(Anatomy, models)
    moved = Anatomy(copy.deepcopy(second.model))
    done = match(units_of(first, moved), torch.Generator().manual_seed(0))
    rows = []
    for name, other in (("as they are", second), ("aligned", moved)):
        curve = curve_of(first, other, held_out(context), LANGUAGE_POINTS)
        rows.append({
            "models": name, "loss of the first": curve.losses[0], "of the second": curve.losses[-1],
            "half way": curve.losses[len(curve.losses) // 2], "barrier": curve.barrier,
            "distance": distance(tensors_of(first.model), tensors_of(other.model)),
        })  # fmt: skip
    before, after = (row["barrier"] for row in rows)
    return Result(
        Verdict.of(after < FAR * before),
        f"the barrier is {before:.4f} nats before and {after:.4f} after {done.sweeps} sweeps; held against {FAR:g} of "
        f"it ({LANGUAGE_STEPS} steps of training each)",
        rows,
    )


@claim(
    "weight-matching/width",
    method="weight-matching",
    paper=REBASIN,
    statement="After matching, wide networks have no barrier to speak of, and the wider they are, the lower it is.",
)
def width(context: Context) -> Result:
    """ReLU networks with two hidden layers on digits, two seeds a width."""
    rows: list[dict[str, Any]] = []
    held = digit_images()[1]
    for size in WIDTHS:
        study = _study(size, STEPS)
        half = copy.deepcopy(study.models[0])
        with torch.no_grad():
            for name, tensor in half.named_parameters():
                tensor.copy_((tensor + study.moved[0].get_parameter(name)) / 2)
        first, second = _numbers(study.models[0]), _numbers(study.models[1])
        rows.append({
            "width": size, "barrier as they are": study.barrier(study.models[0], study.models[1]),
            "barrier aligned": study.barrier(study.models[0], study.moved[0]),
            "accuracy": digit_accuracy(study.models[0], held), "accuracy half way, aligned": digit_accuracy(half, held),
            "distance, of that before": distance(first, _numbers(study.moved[0])) / distance(first, second),
            "sweeps": study.done[0].sweeps,
        })  # fmt: skip
    after = [row["barrier aligned"] for row in rows]
    falls = all(one > other for one, other in itertools.pairwise(after))
    small = after[-1] < 0.1 * rows[-1]["barrier as they are"]
    return Result(
        Verdict.of(falls and small),
        f"aligned barriers {', '.join(f'{one:.4f}' for one in after)} nats at widths {', '.join(map(str, WIDTHS))}; "
        "held against falling with the width, and a tenth of the barrier before at the largest",
        rows,
    )


@claim(
    "weight-matching/leading-directions",
    method="weight-matching",
    paper=ANALYSIS,
    statement="Matching aligns the leading singular vectors, more than all of them, while the distance falls little.",
)
def leading_directions(context: Context) -> Result:
    """R_g with singular values from g of the largest: g = 0.3 against g = 0."""
    rows: list[dict[str, Any]] = []
    for size in WIDTHS:
        study = _study(size, STEPS)
        pairs = [(least, study.models[1], study.moved[0]) for least in (0.0, 0.3)]
        first = _numbers(study.models[0])
        share = distance(first, _numbers(study.moved[0])) / distance(first, _numbers(study.models[1]))
        row: dict[str, Any] = {"width": size, "distance, of that before": share}
        for least, before, after in pairs:
            row |= {
                f"R_{least:g} before": study.alignment(before, least),
                f"R_{least:g}": study.alignment(after, least),
            }
        rows.append(row)
    more = all(row["R_0.3"] - row["R_0.3 before"] > row["R_0"] - row["R_0 before"] > 0 for row in rows)
    little = all(row["distance, of that before"] > 0.5 for row in rows)
    return Result(
        Verdict.of(more and little),
        "R_0.3 rises by " + ", ".join(f"{row['R_0.3'] - row['R_0.3 before']:.2f}" for row in rows) + ", R_0 by "
        + ", ".join(f"{row['R_0'] - row['R_0 before']:.2f}" for row in rows) + "; the distance falls to "
        + ", ".join(f"{row['distance, of that before']:.2f}" for row in rows) + " of that before, held against half",
        rows,
    )  # fmt: skip


@claim(
    "weight-matching/three-models",
    method="weight-matching",
    paper=ANALYSIS,
    statement="Two models that were both matched to a third have a low barrier between each other.",
)
def three_models(context: Context) -> Result:
    """At each width, the barrier between the second and the third network."""
    rows: list[dict[str, Any]] = []
    for size in WIDTHS:
        study = _study(size, STEPS)
        rows.append({
            "width": size, "barrier as they are": study.barrier(*study.models[1:]),
            "barrier, both matched to the first": study.barrier(*study.moved),
        })  # fmt: skip
    lower = all(row["barrier, both matched to the first"] < FAR * row["barrier as they are"] for row in rows)
    return Result(
        Verdict.of(lower),
        "from " + ", ".join(f"{row['barrier as they are']:.3f}" for row in rows) + " to "
        + ", ".join(f"{row['barrier, both matched to the first']:.3f}" for row in rows)
        + f" nats at widths {', '.join(map(str, WIDTHS))}; held against {FAR:g} of it",
        rows,
    )  # fmt: skip
