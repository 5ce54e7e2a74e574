"""Claims of the minimal transformer (Bermeitinger et al., 2024, arXiv:2410.13732)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...evaluation import parameters
from ...parts import build_model
from ..context import Context
from ..descent import descend
from ..digit_networks import digit_images
from ..pairs import paired
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2410.13732"
WIDTH = 48
SIZES: dict[str, Any] = {
    "hidden": WIDTH, "blocks": 4, "heads": 1, "image": 8, "patch": 2, "channels": 1, "classes": 10
}  # fmt: skip
STEPS, BATCH, RATE, SEEDS = 500, 64, 3e-3, (0, 1, 2)  # 22 times all images
_POINTS, _FAR = 2.0, 2.0  # points of accuracy within which two are as good; how often one cost is the other
_NONE = {"values": "none"}


@dataclass(frozen=True)
class Way:
    """What stands in every block: the mixer with its settings (the ViT's own if empty), and an MLP of so many neurons.

    neurons: 0 for no MLP.
    """

    mixer: str = ""
    settings: dict[str, Any] | None = None
    neurons: int = 0


WAYS: dict[str, Way] = {
    "whole": Way(neurons=4 * WIDTH),
    "no MLP": Way(),
    "one matrix of queries and keys, no MLP": Way("merged", {"values": "separate"}),
    "symmetric similarity, no MLP": Way("merged", {"queries": "symmetric", "values": "separate"}),
    "one matrix and no values": Way("minimal", _NONE, 4 * WIDTH),
    "one matrix and no values, no MLP": Way("minimal", _NONE),
    "symmetric similarity and no values, no MLP": Way("minimal", {"similarity": "symmetric", **_NONE}),
    "no attention": Way("identity", neurons=2 * WIDTH),  # as many numbers as attention has
}
QUARTER, TENTH = tuple(WAYS)[1:4], tuple(WAYS)[5:7]
Found = dict[str, list[dict[str, Any]]]


def trained(context: Context) -> Found:
    """Of each way, the accuracy of each seed, and how many parameters; once for all claims. The model plays no part."""
    if "minimal-transformer" not in context.shared:
        context.shared["minimal-transformer"] = {way: [_trained(way, seed) for seed in SEEDS] for way in WAYS}
    return context.shared["minimal-transformer"]


def _trained(way: str, seed: int) -> dict[str, Any]:
    chosen, (shown, asked) = WAYS[way], digit_images()
    parts = ({"mixer": chosen.mixer} if chosen.mixer else {}) | ({} if chosen.neurons else {"mlp": "none"})
    model = build_model(
        "vit", parts=parts, settings={chosen.mixer: chosen.settings or {}}, seed=seed,
        neurons=chosen.neurons or None, **SIZES,
    )  # fmt: skip
    drawn = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        some = torch.randint(len(shown[0]), (BATCH,), generator=drawn)
        return functional.cross_entropy(_logits(model, shown[0][some]), shown[1][some])

    descend(model, loss, STEPS, RATE, weight_decay=0.0)
    with torch.no_grad():
        right = _logits(model, asked[0]).argmax(-1) == asked[1]
    return {"way": way, "seed": seed, "accuracy": 100 * float(right.double().mean()), "parameters": parameters(model)}


def _logits(model: Any, pixels: Tensor) -> Tensor:
    """What the mean of all positions says (B x 10)."""
    return model.classifier(model.vit(pixel_values=pixels.unflatten(1, (1, 8, 8))).last_hidden_state.mean(1))


def _difference(found: Found, way: str, other: str) -> tuple[float, float]:
    """By how many points the first is more accurate, and the standard error over seeds of their difference."""
    return paired(*([row["accuracy"] for row in found[one]] for one in (way, other)))


def _against_the_whole(context: Context, ways: Sequence[str]) -> Result:
    found, told, held, rows = trained(context), [], [], []
    for way in ("whole", *ways):
        difference, error = _difference(found, way, "whole")
        gone = 1 - found[way][0]["parameters"] / found["whole"][0]["parameters"]
        accuracy = mean(row["accuracy"] for row in found[way])
        if way != "whole":
            held.append(difference - 2 * error >= -_POINTS)
            told.append(f"{way} {accuracy:.1f} % ({difference:+.1f} ± {error:.1f} points, {gone:.0%} of them gone)")
        rows += [{**row, "more than whole": difference, "standard error": error, "gone": gone} for row in found[way]]
    whole = mean(row["accuracy"] for row in found["whole"])
    return Result(
        Verdict.of(all(held)),
        f"Accuracy on held-out digits, {len(SEEDS)} seeds: whole {whole:.1f} % with "
        f"{found['whole'][0]['parameters']:,} parameters; {'; '.join(told)}",
        rows,
    )


@claim(
    "minimal-transformer/two-thirds-gone",
    method="minimal-transformer",
    paper=PAPER,
    statement="An image classifier without MLPs is as accurate as the whole one, also if queries and keys are one "
    "matrix, and if that is symmetric: two thirds to three quarters of the parameters are saved.",
)
def two_thirds_gone(context: Context) -> Result:
    """Scaled down: vision transformers of four blocks, width 48 and one head on handwritten digits of 8 x 8 pixels in
    16 patches; 500 steps of 64 images, one rate for all.

    As accurate is less than two points below, by two standard errors of the difference over seeds, in which images,
    order and what is drawn for the same parts are the same. Our blocks norm first; the classifier reads the mean of all
    positions, so that it is fair to what has no attention.
    """
    return _against_the_whole(context, QUARTER)


@claim(
    "minimal-transformer/nine-tenths-gone",
    method="minimal-transformer",
    paper=PAPER,
    statement="An image classifier without MLPs, values and output, of whose attention one matrix is left, or half of "
    "one that is symmetric, is as accurate as the whole one: nine tenths of the parameters are saved.",
)
def nine_tenths_gone(context: Context) -> Result:
    """Where, and what as accurate means: see two-thirds-gone."""
    return _against_the_whole(context, TENTH)


@claim(
    "minimal-transformer/without-mlp",
    method="minimal-transformer",
    paper=PAPER,
    statement="To leave MLPs out costs an image classifier far less accuracy than to leave attention out, with as many "
    "parameters left.",
)
def without_mlp(context: Context) -> Result:
    """Where: see two-thirds-gone. Without attention MLPs have half as many neurons, so that as many numbers are left.

    Far less is no more than half, where the difference is clear of two standard errors over seeds. Read at a class
    position, as the paper's are, models without attention would know nothing of the image.
    """
    found = trained(context)
    costs = {way: tuple(-one for one in _difference(found, way, "whole")) for way in ("no MLP", "no attention")}
    difference, error = _difference(found, "no MLP", "no attention")
    held = difference > 2 * error and _FAR * costs["no MLP"][0] <= costs["no attention"][0]
    told = ", ".join(
        f"{way} {cost:+.1f} ± {-spread:.1f} with {found[way][0]['parameters']:,} parameters"
        for way, (cost, spread) in costs.items()
    )
    return Result(
        Verdict.of(held),
        f"Points of accuracy that it costs, {len(SEEDS)} seeds: {told}; no MLP is {difference:+.1f} ± {error:.1f} "
        "points above no attention",
        [row for way in ("whole", *costs) for row in found[way]],
    )
