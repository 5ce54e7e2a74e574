"""Claims of feature neurons (Davies, arXiv:2501.02688)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...data import Specimen
from ...probes import probe
from ...probes.catalog.feature_neurons.clamping import Chosen, Effects, clamp_effects, short_text
from ...probes.catalog.feature_neurons.decoded import decode
from ...probes.catalog.feature_neurons.stability import stability
from ...probes.neurons import Vector, kinds_of, unembedding
from ..context import Context
from ..descent import descend
from ..registry import NotApplicable, Result, Verdict, claim

NEURONS, CONTROLS = 16, 6
STRENGTHS = (1.0, 4.0, 16.0)  # times the usual size of the neuron's up-projection
DECODED: tuple[tuple[Vector, tuple[float, ...]], ...] = (("up", STRENGTHS), ("down", STRENGTHS[1:2]))
STEPS, BATCH, LENGTH = 50, 8, 64  # of tuning: steps, sequences in each, tokens of a sequence
RATES, JUDGED = (1e-5, 1e-4, 1e-3), 1e-4  # largest learning rates
KEPT = 0.75  # the paper's share
PROBE = probe("feature-neurons")


@claim(
    "feature-neurons/own-token",
    method="feature-neurons",
    paper=PROBE.paper,
    statement="Holding an MLP neuron at a large value makes the token that its up-projection decodes to more likely, "
    "more than holding a random neuron of the block with as large an output does.",
)
def own_token(context: Context) -> Result:
    """The neurons that stand out most, each against random ones; at three strengths, and by its output for comparison.

    The paper shows examples; the average over neurons, the controls and the strengths are our design. It holds where
    the mean difference from the controls is above two standard errors over the neurons, at strength 4 and at 16.
    """
    context.require_language_model()
    specimen = context.fresh()
    ids, kinds = short_text(specimen), kinds_of(specimen.anatomy.blocks)
    if not kinds:
        raise NotApplicable("no block of this model has an MLP left")
    decoded = decode(specimen, unembedding(specimen.lens), kinds, top=1)
    rows: list[dict[str, Any]] = []
    for kind, strengths in DECODED:
        places = decoded.ranked(NEURONS, (kind,), (0, 1) if "gate" in kinds else (0,))
        chosen = [Chosen(place[2], place[3], 1 - 2 * place[1], int(decoded.tokens[place][0])) for place in places]
        if len(chosen) < 2:
            raise NotApplicable(f"only {len(chosen)} neurons decode to tokens of their own")
        for strength in strengths:
            rows.append(_row(kind, strength, clamp_effects(specimen, chosen, ids, strength, CONTROLS)))
    judged = [row for row in rows if row["decoded by"] == "up" and row["strength"] > 1]
    holds = all(row["difference"] > 2 * row["standard error"] for row in judged)
    listed = "; ".join(
        f"{row['own token, nats']:+.3f} against {row['random neurons, nats']:+.3f} ({row['difference']:+.3f} "
        f"± {row['standard error']:.3f}) at {row['strength']:g} times the usual size"
        for row in judged
    )
    by_output = rows[-1]
    return Result(
        Verdict.of(holds),
        f"Mean change of the log-probability of the own token of {judged[0]['neurons']} neurons, against that of "
        f"random neurons with as large an output: {listed}. Decoded by what they write instead (columns of down), it "
        f"is {by_output['own token, nats']:+.3f} against {by_output['random neurons, nats']:+.3f}.",
        rows,
    )


def _row(kind: str, strength: float, effects: Effects) -> dict[str, Any]:
    others = effects.others.nanmean(1)
    difference = effects.own - others
    return {
        "decoded by": kind, "strength": strength, "neurons": len(difference),
        "own token, nats": float(effects.own.mean()), "random neurons, nats": float(others.mean()),
        "difference": float(difference.mean()), "standard error": float(difference.std() / len(difference) ** 0.5),
        "change of the loss, nats": float(effects.loss.mean()),
    }  # fmt: skip


@claim(
    "feature-neurons/stability",
    method="feature-neurons",
    paper=PROBE.paper,
    statement="Over 75 % of the up-projection neurons still decode to the same token after the model was tuned.",
)
def stable(context: Context) -> Result:
    """A short full fine-tuning on the calibration text, our stand-in for base against instruction-tuned.

    All weights, embeddings and head included; AdamW without weight decay, 50 steps of 8 sequences of up to 64 tokens,
    the learning rate rising over 5 steps to 1e-4 and then falling to 0 in a straight line, gradients clipped to 1. It
    holds where the share is above 75 % at that rate. The other rates show how it depends on how far a model is tuned.
    """
    context.require_language_model()
    rows = list(context.calibration.texts())
    base, before = context.fresh(), context.evaluate(context.fresh().model, 1.0)
    numbers = []
    for rate in RATES:
        tuned = context.fresh()
        _tune(tuned, rows, rate)
        found, after = stability(base, tuned), context.evaluate(tuned.model, 1.0)
        numbers.append(
            {"rate": rate, "steps": STEPS, "loss on the text before": _loss(base, rows),
             "loss on the text after": _loss(tuned, rows), "held-out loss before": before.loss,
             "held-out loss after": after.loss, "change of up, relative": _moved(base, tuned)}
            | {f"kept, {kind}": float(share) for kind, share in zip(found.kinds, found.shares, strict=True)}
            | {"kept, up, lowest layer": float(found.layers[0].nan_to_num(torch.inf).min()),
               "kept by chance, up": float(found.chance[0])}
        )  # fmt: skip
    judged = numbers[RATES.index(JUDGED)]
    listed = ", ".join(f"{row['kept, up']:.1%} at {row['rate']:g}" for row in numbers)
    return Result(
        Verdict.of(judged["kept, up"] > KEPT),
        f"After {STEPS} steps at a learning rate of {JUDGED:g} {judged['kept, up']:.1%} of the up-projection neurons "
        f"keep their top token ({judged['kept by chance, up']:.1%} by chance). The loss went from "
        f"{judged['loss on the text before']:.4f} to {judged['loss on the text after']:.4f} on the text itself and "
        f"from {judged['held-out loss before']:.4f} to {judged['held-out loss after']:.4f} held out; up changed by "
        f"{judged['change of up, relative']:.2%} of its length. By rate: {listed}. How many keep it depends on how far "
        "the model is tuned; instruction tuning of a large model is another matter.",
        numbers,
    )


def _tune(specimen: Specimen, rows: list[Tensor], rate: float) -> None:
    """Train the whole model in place."""
    model, batches = specimen.model, list(_batches(rows, specimen.seed))
    descend(model, lambda step: _loss_of(model, batches[step]), STEPS, rate, 0.0, warm_up=5 / STEPS, shape="linear")


@torch.no_grad()
def _loss(specimen: Specimen, rows: list[Tensor]) -> float:
    """Mean loss on the first eight of the batches that tuning goes through, in nats."""
    batches = islice(_batches(rows, specimen.seed), 8)
    losses = [_loss_of(specimen.model, ids).item() for ids in batches]
    return sum(losses) / len(losses)


def _loss_of(model: Any, ids: Tensor) -> Tensor:
    ids = ids.to(model.device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _batches(rows: list[Tensor], seed: int) -> Iterator[Tensor]:
    """STEPS batches of beginnings of sequences, all equally long; each sequence once before one comes again."""
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        while len(order) < BATCH:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = [rows[number] for number in order[:BATCH]], order[BATCH:]
        length = min(LENGTH, *map(len, chosen))
        yield torch.stack([row[:length] for row in chosen])


def _moved(base: Specimen, tuned: Specimen) -> float:
    """Length of the change of all matrices up over their length."""
    pairs = zip(base.anatomy.matrices(["up"]), tuned.anatomy.matrices(["up"]), strict=True)
    sums = [((b.weight - a.weight).square().sum(), a.weight.square().sum()) for a, b in pairs]
    return float((sum(change for change, _ in sums) / sum(size for _, size in sums)) ** 0.5)
