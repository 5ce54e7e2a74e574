"""Claims of MatFormer (Devvrit et al., NeurIPS 2024, arXiv:2310.07707)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...conversion.catalog.matformer.nested import narrowed
from ...parts import build_model
from ..context import Context, Measured
from ..descent import descend
from ..on_text import held_out, measured_on_text
from ..pairs import paired
from ..registry import Result, Verdict, claim
from ..scratch import cut, fresh_rows

SIZES: dict[str, Any] = {"hidden": 64, "blocks": 4, "heads": 4}
NEURONS = (32, 64, 128, 256)  # S, M, L, XL: half the width to four times it
NAMES = ("S", "M", "L", "XL")
LENGTH, BATCH, STEPS, RATE = 64, 8, 240, 3e-3
MARGIN = 0.02  # of the loss, that nested models may lose; far more is twice that


@dataclass
class Trained:
    """Models trained on the same sequences in the same order: the nested one, and one of each width by itself."""

    nested: Any
    alone: dict[int, Any]


_DONE: WeakKeyDictionary[Context, Trained] = WeakKeyDictionary()


def trained(context: Context) -> Trained:
    """All five, once for all claims."""
    if context not in _DONE:
        context.require_language_model()
        alone = {neurons: _from_scratch(context, neurons, nested=False) for neurons in NEURONS}
        _DONE[context] = Trained(_from_scratch(context, NEURONS[-1], nested=True), alone)
    return _DONE[context]


def _from_scratch(context: Context, neurons: int, nested: bool) -> Any:
    longest = max(map(len, context.evaluation.texts()))
    rows = cut(fresh_rows(context, STEPS * BATCH * LENGTH)[0], min(LENGTH, longest), STEPS * BATCH)
    model = build_model(
        "llama", neurons=neurons, vocabulary=context.anatomy.config.vocab_size, length=longest + 1, **SIZES
    ).to(context.model.device)
    anatomy, drawn = Anatomy(model), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        ids = torch.stack([rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]).to(model.device)
        width = NEURONS[int(torch.randint(len(NEURONS), (1,), generator=drawn))]
        with narrowed(anatomy, [width] * SIZES["blocks"]) if nested else nullcontext():
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    descend(model, loss, STEPS, RATE, progress=context.progress)
    return model


def _at(context: Context, model: Any, widths: Sequence[int]) -> Measured:
    with narrowed(Anatomy(model), widths):
        return measured_on_text(context, model)


def _even(context: Context, model: Any) -> dict[int, Measured]:
    return {m: _at(context, model, [m] * SIZES["blocks"]) for m in NEURONS}


@claim(
    "matformer/as-trained-alone",
    method="matformer",
    paper="arXiv:2310.07707",
    statement="Each of the models that one nested training gives loses at most 2 % against a model of its size that "
    "was trained alone, their loss falls with size, and the first neurons of an ordinary model lose far more.",
)
def as_trained_alone(context: Context) -> Result:
    """Llamas of four blocks and width 64 from random weights, widths drawn alike; the same steps, data and order, one
    seed. A nested model has been trained at each width in a quarter of its steps, one that was trained alone in all.
    Far more is at least twice those 2 %, and clear of two standard errors over the held-out sequences.
    """
    models = trained(context)
    nested, prefixes = _even(context, models.nested), _even(context, models.alone[NEURONS[-1]])
    alone = {m: measured_on_text(context, models.alone[m]) for m in NEURONS}
    rows = []
    for name, m in zip(NAMES, NEURONS, strict=True):
        difference, error = nested[m].minus(alone[m])
        more, more_error = prefixes[m].minus(alone[m])
        rows.append({
            "model": name, "neurons": m, "nested": nested[m].loss, "trained alone": alone[m].loss,
            "more, in %": 100 * difference / alone[m].loss, "standard error": 100 * error / alone[m].loss,
            "first neurons of the ordinary XL": prefixes[m].loss, "more of those, in %": 100 * more / alone[m].loss,
            "their standard error": 100 * more_error / alone[m].loss,
        })  # fmt: skip
    close = all(row["more, in %"] <= 100 * MARGIN for row in rows)
    far = all(
        row["more of those, in %"] >= max(200 * MARGIN, 2 * row["their standard error"]) for row in rows[:-1]
    )  # XL has all neurons
    falls = all(a["nested"] >= b["nested"] for a, b in pairwise(rows))
    told = ", ".join(
        f"{row['model']} {row['nested']:.3f} ({row['more, in %']:+.1f} % of {row['trained alone']:.3f}; first neurons "
        f"of XL {row['first neurons of the ordinary XL']:.3f})"
        for row in rows
    )
    return Result(
        Verdict.of(close and far and falls),
        f"Loss of nested models: {told}. It {'falls' if falls else 'does not always fall'} with size",
        rows,
    )


@claim(
    "matformer/mixtures",
    method="matformer",
    paper="arXiv:2310.07707",
    statement="Models with different widths in different blocks, for which nothing was trained, lie within 2 % of the "
    "line between the trained ones of neighbouring size; widths that rise with depth are better than others.",
)
def mixtures(context: Context) -> Result:
    """Two neighbouring widths each, in as many blocks as not: the wider ones behind, and the same in front (their mean
    size is the same), beside a random order. The line is that of loss over the number of neurons.
    """
    model, blocks = trained(context).nested, SIZES["blocks"]
    even = {m: found.loss for m, found in _even(context, model).items()}
    drawn, rows = torch.Generator().manual_seed(0), []
    for small, large in pairwise(NEURONS):
        for wide in range(1, blocks):
            widths = [small] * (blocks - wide) + [large] * wide
            orders = {
                "rising": widths, "falling": widths[::-1],
                "any": [widths[i] for i in torch.randperm(blocks, generator=drawn)],
            }  # fmt: skip
            line = even[small] + (even[large] - even[small]) * wide / blocks
            for order, chosen in orders.items():
                loss = _at(context, model, chosen).loss
                rows.append({
                    "order": order, "widths": ",".join(map(str, chosen)), "loss": loss, "line": line,
                    "more, in %": 100 * (loss - line) / line,
                })  # fmt: skip
    of = {order: mean(row["loss"] for row in rows if row["order"] == order) for order in ("rising", "falling", "any")}
    furthest = max(row["more, in %"] for row in rows if row["order"] == "rising")
    held = furthest <= 100 * MARGIN and of["rising"] <= min(of["falling"], of["any"])
    return Result(
        Verdict.of(held),
        f"Rising widths are at most {furthest:+.2f} % from the line; mean loss "
        + ", ".join(f"{order} {loss:.4f}" for order, loss in of.items()),
        rows,
    )


@claim(
    "matformer/consistency",
    method="matformer",
    paper="arXiv:2310.07707",
    statement="The smallest nested model predicts the largest one's token more often than a small model that was "
    "trained alone predicts that of a large one.",
)
def consistency(context: Context) -> Result:
    """Top-1 agreement over all held-out positions; one seed. More often is by two standard errors over sequences."""
    models = trained(context)
    small, large = [NEURONS[0]] * SIZES["blocks"], [NEURONS[-1]] * SIZES["blocks"]
    nested = _agreements(_tops(context, models.nested, small), _tops(context, models.nested, large))
    alone = _agreements(_tops(context, models.alone[NEURONS[0]]), _tops(context, models.alone[NEURONS[-1]]))
    difference, error = paired(nested, alone)
    return Result(
        Verdict.of(difference > 2 * error),
        f"S and XL agree at {mean(nested):.1%} of the positions when nested, at {mean(alone):.1%} when trained alone "
        f"(apart by {100 * difference:.1f} ± {100 * error:.1f} points)",
        [
            {"models": "nested", "agreement": mean(nested)}, {"models": "trained alone", "agreement": mean(alone)},
            {"difference": difference, "standard error": error},
        ],
    )  # fmt: skip


@torch.no_grad()
def _tops(context: Context, model: Any, widths: Sequence[int] | None = None) -> list[Tensor]:
    """The likeliest tokens of each held-out sequence."""
    with nullcontext() if widths is None else narrowed(Anatomy(model), widths):
        texts = [text[None].to(model.device) for text in held_out(context).texts()]
        return [model(text, use_cache=False).logits[0].argmax(-1) for text in texts]


def _agreements(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    return [float((one == other).double().mean()) for one, other in zip(ones, others, strict=True)]
