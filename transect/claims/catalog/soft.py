"""Claims of SOFT (Lu et al., NeurIPS 2021 and IJCV 2024, arXiv:2207.03341)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...parts import build_model
from ...tasks import task_named
from ..context import Context
from ..descent import descend
from ..registry import Result, Verdict, claim

SIZES: dict[str, Any] = {
    "hidden": 32,
    "blocks": 2,
    "heads": 2,
    "neurons": 64,
    "image": 8,
    "patch": 1,
    "channels": 1,
    "classes": 10,
}
LANDMARKS = 16  # of 64 positions
STEPS, BATCH, RATES, SEEDS = 300, 32, (3e-3, 1e-2), (0, 1)
TESTED = 720
_POINTS = 2.0  # of accuracy, within which two are as good
_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "soft": ("soft", {"landmarks": LANDMARKS, "positions": "map"}),
    "performer": ("performer", {"features": LANDMARKS}),
}  # fmt: skip


@claim(
    "soft/as-accurate",
    method="soft",
    paper="arXiv:2207.03341",
    statement="In a classifier of images trained from scratch, SOFT is as accurate as softmax attention, and more "
    "accurate than a Performer with as many features as it has landmarks.",
)
def as_accurate(context: Context) -> Result:
    """Scaled down: vision transformers of two blocks on handwritten digits of 8 x 8 pixels, each pixel a position.

    As accurate is not more than two points below. Each way at the rate with the lower loss in the last tenth of the
    training, the same images in the same order. Our blocks norm first, the paper's after the sum; our classifier reads
    a class position.
    """
    rows = [{"mixer": way, "seed": seed, **_trained(*_WAYS[way], seed)} for way in _WAYS for seed in SEEDS]
    mean = {way: sum(row["accuracy"] for row in rows if row["mixer"] == way) / len(SEEDS) for way in _WAYS}
    failed = [] if mean["soft"] >= mean["softmax"] - _POINTS else ["softmax"]
    failed += [] if mean["soft"] > mean["performer"] else ["performer"]
    told = ", ".join(f"{way} {value:.1f} %" for way, value in mean.items())
    against = f" Not so against {' and '.join(failed)}." if failed else ""
    verdict = Verdict.of(not failed)
    return Result(verdict, f"Accuracy on {TESTED} digits, {len(SEEDS)} seeds: {told}.{against}", rows)


def _trained(mixer: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracy in per cent and the rate at which it was reached."""
    shown = task_named("digits").draw(STEPS * BATCH, 2 * seed)
    asked = task_named("digits").draw(TESTED, 2 * seed + 1)
    best: tuple[float, float, Any] | None = None
    for rate in RATES:
        model = build_model("vit", parts={"mixer": mixer}, settings={mixer: settings}, seed=seed, **SIZES)
        losses: list[float] = []

        def loss(step: int, model: Any = model, losses: list[float] = losses) -> Tensor:
            some = slice(step * BATCH, (step + 1) * BATCH)
            value = model(pixel_values=shown.inputs[some], labels=shown.answers[some]).loss
            losses.append(float(value.detach()))
            return value

        descend(model, loss, STEPS, rate)
        last = losses[-max(1, STEPS // 10) :]
        if best is None or sum(last) < best[0]:
            best = sum(last), rate, model
    assert best is not None
    with torch.no_grad():
        right = best[2](pixel_values=asked.inputs).logits.argmax(-1) == asked.answers
    return {"accuracy": 100 * float(right.double().mean()), "rate": best[1]}
