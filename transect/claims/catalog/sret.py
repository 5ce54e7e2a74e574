"""Claims of SReT (Shen et al., ECCV 2022, arXiv:2111.05297)."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...conversion.catalog.sret import recursive
from ...evaluation import parameters
from ...parts import build_model
from ...tasks import task_named
from ..context import Context
from ..descent import descend
from ..pairs import paired
from ..registry import Result, Verdict, claim

WIDTH, NEURONS = 32, 96
SIZES: dict[str, Any] = {
    "hidden": WIDTH, "blocks": 2, "heads": 2, "image": 8, "patch": 1, "channels": 1, "classes": 10
}  # fmt: skip
# What stands around a block's two turns has 4 width² + 8 width + 12 numbers, and a neuron 2 width + 1.
MORE = round((4 * WIDTH**2 + 8 * WIDTH + 12) / (2 * WIDTH + 1))
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "recursive": {"ratio": 1.0, "groups": 1, "groups_later": 1},
    "without networks between": {"ratio": 0.0, "groups": 1, "groups_later": 1},
    "sliced": {"ratio": 1.0, "groups": 4, "groups_later": 2},
}
STEPS, BATCH, RATE, SEEDS = 300, 32, 3e-3, tuple(range(8))
TESTED = 720
_POINTS = 1.0  # of accuracy, by which slices may lower it


@claim(
    "sret/turns",
    method="sret",
    paper="arXiv:2111.05297",
    statement="With as many parameters, an image classifier whose blocks are gone through twice, with small networks "
    "between, is more accurate than one without; without the networks it gains less, and slices lose no point.",
)
def turns(context: Context) -> Result:
    """Scaled down: vision transformers of two blocks on handwritten digits of 8 x 8 pixels, each pixel a position.

    Judged by what is clear of two standard errors of the differences over seeds. Numbers of neurons make up for the
    networks between. No weight decay, which would draw the sums' weights and the map of positions to 0. The classifier
    reads a class position, which stands in the first slice; the paper's averages all. The model plays no part.
    """
    rows = [{"model": way, "seed": seed, **_trained(way, seed)} for way in WAYS for seed in SEEDS]
    found = {way: [row["accuracy"] for row in rows if row["model"] == way] for way in WAYS}
    wrong, compared = [], []
    for better, worse, least, said in (
        ("recursive", "plain", 0.0, "the recursive one is not clearly above the plain one"),
        ("recursive", "without networks between", 0.0, "it does not clearly gain less without networks between"),
        ("sliced", "recursive", -_POINTS, "it is not clear that slices lose no more than a point"),
    ):
        difference, error = paired(found[better], found[worse])
        compared.append({"better": better, "worse": worse, "difference": difference, "standard error": error})
        if not difference - 2 * error > least:
            wrong.append(f"{said} ({difference:+.1f} ± {error:.1f})")
    told = ", ".join(f"{way} {mean(each):.1f} %" for way, each in found.items())
    return Result(
        Verdict.of(not wrong),
        f"Accuracy on {TESTED} digits, {len(SEEDS)} seeds: {told}"
        + "".join(f". {said[0].upper()}{said[1:]}" for said in wrong),
        [*rows, *compared],
    )


def _trained(way: str, seed: int) -> dict[str, Any]:
    """Accuracy in per cent, and the number of parameters."""
    shown = task_named("digits").draw(STEPS * BATCH, 2 * seed)
    asked = task_named("digits").draw(TESTED, 2 * seed + 1)
    settings = WAYS[way]
    has_networks = settings is not None and settings["ratio"] > 0
    neurons = NEURONS if has_networks else NEURONS + MORE
    model = build_model("vit", seed=seed, neurons=neurons, **SIZES)
    if settings is not None:
        recursive(Anatomy(model), 2, shuffle="fixed", seed=seed, **settings)

    def loss(step: int) -> Tensor:
        some = slice(step * BATCH, (step + 1) * BATCH)
        return model(pixel_values=shown.inputs[some], labels=shown.answers[some]).loss

    descend(model, loss, STEPS, RATE, weight_decay=0.0)
    with torch.no_grad():
        right = model(pixel_values=asked.inputs).logits.argmax(-1) == asked.answers
    return {"accuracy": 100 * float(right.double().mean()), "parameters": parameters(model)}
