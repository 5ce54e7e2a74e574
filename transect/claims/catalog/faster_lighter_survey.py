"""A claim of the survey on faster and lighter transformers (Fournier et al., ACM Computing Surveys 2023)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...parts import insert
from ...parts.slots import MixerSlot
from ..context import Context, Measured
from ..descent import descend
from ..registry import NotApplicable, Result, Verdict, claim

WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "local": tuple({"window": size} for size in (2, 8, 32)),
    "performer": tuple({"features": count} for count in (16, 64, 256)),
    "linear": ({},),
}
STEPS, RATE = 60, 1e-3
CLOSED = 0.5  # of the gap: what counts as most of it
LARGEST = 10_000_000  # numbers of a model that a claim trains


@claim(
    "faster-lighter-survey/swapped",
    method="faster-lighter-survey",
    paper="arXiv:2103.14636",
    statement="In place of a trained model's softmax attention, with its own matrices and no training, attention "
    "within a window and by random features loses less the larger the window and the more features, linear attention "
    "loses most, and a short training closes most of its gap.",
)
def swapped(context: Context) -> Result:
    """All layers at once, windows of 2, 8 and 32 positions, 16, 64 and 256 features.

    Linformer and Nyström attention, the survey's others with such a size, have no causal form. The training is of every
    number, on the calibration data, at one rate; most of the gap is half of it. Errors over held-out sequences, in
    pairs; a row's difference is to softmax attention.
    """
    context.specimen.require_causal()
    numbers = sum(parameter.numel() for parameter in context.model.parameters())
    if numbers > LARGEST:
        raise NotApplicable(f"it trains the model, which has {numbers:,} numbers: above {LARGEST:,}")
    exact = context.evaluate(_with_mixer(context, "softmax", {}), 1.0)
    if abs(exact.loss - context.dense.loss) > 1e-3:
        raise NotApplicable("this model's attention is more than softmax of scaled products of its four matrices")
    found: dict[str, list[Measured]] = {}
    rows = [{"mixer": "softmax", "loss": exact.loss}]
    for way, sizes in WAYS.items():
        for settings in sizes:
            measured = context.evaluate(_with_mixer(context, way, settings), 1.0)
            found.setdefault(way, []).append(measured)
            rows.append(_row(f"{way} {settings}" if settings else way, measured, exact))
    model, batches = _with_mixer(context, "linear", {}), list(context.calibration)

    def loss(step: int) -> Tensor:
        batch = batches[step % len(batches)]
        return model(**{"labels": batch["input_ids"], **batch}).loss

    descend(model, loss, STEPS, RATE)
    repaired, worst = context.evaluate(model, 1.0), found["linear"][0]
    rows.append(_row(f"linear, {STEPS} steps later", repaired, exact))
    closed = (worst.loss - repaired.loss) / (worst.loss - exact.loss)
    failed = [
        f"{way} does not lose less the larger it is"
        for way, sizes in found.items()
        if any(b.loss >= a.loss for a, b in itertools.pairwise(sizes))
    ]
    others = [measured.loss for way, sizes in found.items() if way != "linear" for measured in sizes]
    failed += [] if worst.loss > max(others) else ["linear attention does not lose most"]
    failed += [] if closed >= CLOSED else ["the training closes less than half of its gap"]
    told = (
        f"Untrained, linear attention loses {worst.loss - exact.loss:.3f} nats, the others from "
        f"{min(others) - exact.loss:.3f} to {max(others) - exact.loss:.3f}; {STEPS} steps close {closed:.0%} of its "
        "gap."
    )
    against = "".join(f" {reason[0].upper()}{reason[1:]}." for reason in failed)
    return Result(Verdict.DOES_NOT_HOLD if failed else Verdict.HOLDS, told + against, rows)


def _row(name: str, measured: Measured, exact: Measured) -> dict[str, Any]:
    difference, error = measured.minus(exact)
    return {"mixer": name, "loss": measured.loss, "difference": difference, "error": error}


@torch.no_grad()
def _with_mixer(context: Context, name: str, settings: dict[str, Any]) -> Any:
    """A copy of the model with a mixer in all blocks that computes with the attention's own matrices."""
    model = context.fresh().model
    matrices = Anatomy(model).matrices(["q", "k", "v", "o"])
    if any(getattr(matrix.module, "bias", None) is not None for matrix in matrices):
        raise NotApplicable("the matrices of this model's attention have biases, which the mixers' have not")
    kept = {(matrix.block.index, matrix.role): matrix.weight.clone() for matrix in matrices}
    size = Anatomy(model).head_size
    insert(model, "mixer", name, settings=settings)
    for slot in (module for module in model.modules() if isinstance(module, MixerSlot)):
        for role, path in slot.part.roles.items():
            into: Any = slot.part.get_submodule(path).weight
            weight = kept[slot.layer_idx, role]
            groups = len(into) // len(weight)  # query heads that share a key and a value
            if groups > 1:
                weight = weight.unflatten(0, (-1, size)).repeat_interleave(groups, dim=0).flatten(0, 1)
            into.copy_(weight)
    return model.eval()
