"""Claims of Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672)."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import Any

import torch

from ...anatomy import Anatomy
from ...conversion import Plan, Stage, conversion_named, convert_anatomy
from ...conversion.catalog.relaxed_recursive import exit_loss
from ...evaluation import parameters
from ...forward import task_of
from ..context import Context, Measured
from ..cut_mlps import cut, repaired
from ..registry import NotApplicable, Result, Verdict, claim

LOOPS = 2
PAPERS: dict[str, Any] = {"loops": LOOPS, "norms": "shared"}
STEPS, BATCH, RATE = 60, 4, 1e-3
RANKS = (0, 4, 16, 64)
RANK = 16  # of those that are trained, moderate for a width of some hundreds
EXITS = 0.1  # the paper's weight of what loops say before the last
WAYS: dict[str, dict[str, Any]] = {
    "random": {"rank": 0, "init": "stepwise", "lowers": "own"},
    "stepwise": {"rank": 0, "init": "stepwise", "lowers": "own"},
    "relaxed": {"rank": RANK},
    "relaxed from zero": {"rank": RANK, "start": "zero"},
    "relaxed, own loss": {"rank": RANK, "lowers": "own"},
}


def _of_even_blocks(context: Context) -> None:
    if task_of(context.model) != "causal":
        raise NotApplicable(f"it is a claim about language models, and {type(context.model).__name__} is none")
    count = len(context.anatomy.blocks)
    if count % LOOPS:
        raise NotApplicable(f"{count} blocks are not {LOOPS} equal loops")


@claim(
    "relaxed-recursive/after-training",
    method="relaxed-recursive",
    paper="arXiv:2410.20672",
    statement="After the same short training, a model in two loops that began as the trained one is better than one "
    "that began at random; low-rank corrections of each depth make it better still, more so if they begin as what was "
    "lost than as zero, and if the training follows the model as it was.",
)
def after_training(context: Context) -> Result:
    """60 steps of four sequences of the calibration data; losses on held-out data, with errors over its sequences.

    What is compared was trained by the same loss: the model's own where a model that began at random, which has nothing
    to follow, or the training's loss itself is at issue. The whole model with the same training by its own loss stands
    beside them and is not judged; it stays as it was where that makes it no better.
    """
    _of_even_blocks(context)
    found: dict[str, Measured] = {}
    rows = []
    for way, settings in WAYS.items():
        found[way], row = _trained(context, way, settings)
        rows.append({"way": way, **row, "loss": found[way].loss})
    whole = repaired(context, context.fresh().anatomy, [Stage("uptraining", train="full")], STEPS)
    found["whole, own loss"] = context.evaluate(whole, 1.0)
    rows.append({
        "way": "whole, own loss", "parameters": parameters(whole), "loss before training": context.dense.loss,
        "loss": found["whole, own loss"].loss,
    })  # fmt: skip
    orders = [
        ("stepwise", "random"), ("relaxed, own loss", "stepwise"), ("relaxed", "relaxed from zero"),
        ("relaxed", "relaxed, own loss"),
    ]  # fmt: skip
    against = []
    for better, worse in orders:
        difference, error = found[better].minus(found[worse])
        rows.append({"better": better, "worse": worse, "difference": difference, "standard error": error})
        if not difference < 0:
            against.append(f"{better} is not below {worse} ({difference:+.4f} ± {error:.4f})")
    told = ", ".join(f"{way} {measured.loss:.4f}" for way, measured in found.items())
    return Result(
        Verdict.DOES_NOT_HOLD if against else Verdict.HOLDS,
        f"Loss after {STEPS} steps: {told}; dense {context.dense.loss:.4f}"
        + "".join(f". {said[0].upper()}{said[1:]}" for said in against),
        rows,
    )


def _trained(context: Context, way: str, settings: dict[str, Any]) -> tuple[Measured, dict[str, Any]]:
    anatomy = context.fresh().anatomy
    if way == "random":
        torch.manual_seed(0)
        for block in anatomy.blocks:
            block.module.apply(anatomy.model._init_weights)
    own = {name: value for name, value in settings.items() if name != "lowers"}
    plan = Plan(
        "relaxed-recursive", PAPERS | own, steps=STEPS, lr=RATE, batch_size=BATCH, lowers=settings.get("lowers"),
        every=STEPS,
    )  # fmt: skip
    model, outcome = convert_anatomy(anatomy, plan, context.calibration)
    measured = context.evaluate(model, outcome["bytes"][1] / outcome["bytes"][0])
    return measured, {"parameters": parameters(model), "loss before training": outcome["loss_converted"]}


@claim(
    "relaxed-recursive/early-exit",
    method="relaxed-recursive",
    paper="arXiv:2410.20672",
    statement="A second training that also draws what the first loop says to what the last one says, with a weight of "
    "0.1, makes the first loop's predictions better, and moves the loss of the last one by less than 1 %.",
)
def early_exit(context: Context) -> Result:
    """60 steps towards the model as it was, then 60 by the model's own loss with that of the exits and, from the same
    state, without; two loops with corrections of rank 16.

    Better than before, and than without, is by two standard errors over the held-out sequences. The last loop's loss is
    set against that of the training without exits, since a model that was trained for so short moves by any more steps.
    """
    _of_even_blocks(context)
    anatomy = cut(context, "relaxed-recursive", **PAPERS, rank=RANK)
    chosen = conversion_named("relaxed-recursive")
    uptraining, exits = chosen.training(chosen.settings(PAPERS | {"rank": RANK, "early_exit": EXITS}))
    repaired(context, anatomy, [replace(uptraining, share=1.0)], STEPS)
    found = {"before": _of_loops(context, anatomy.model)}
    for way, weight in (("with exits", EXITS), ("without", 0.0)):
        copied = Anatomy(copy.deepcopy(anatomy.model), anatomy.architecture)
        loss = exit_loss(LOOPS, weight)
        model = repaired(context, copied, [replace(exits, share=1.0, loss=loss, judged=loss)], STEPS)
        found[way] = _of_loops(context, model)
    rows: list[dict[str, Any]] = []
    for way, (first, last) in found.items():
        rows.append({"training": way, "loss of the first loop": first.loss, "loss of the last loop": last.loss})
    (first, last), (_, alone) = found["with exits"], found["without"]
    held = []
    for way in ("before", "without"):
        difference, error = first.minus(found[way][0])
        held.append(difference + 2 * error < 0)
        rows.append({"first loop, with exits against": way, "difference": difference, "standard error": error})
    difference, error = last.minus(alone)
    moved = difference / alone.loss
    rows.append({"last loop, with exits against": "without", "difference": difference, "standard error": error})
    told = ", ".join(f"{way} {first.loss:.4f} and {last.loss:.4f}" for way, (first, last) in found.items())
    return Result(
        Verdict.of(all(held) and abs(moved) < 0.01),
        f"Losses of the first and the last loop: {told}; the exits move the last one's by {moved:+.2%}",
        rows,
    )


def _of_loops(context: Context, model: Any) -> tuple[Measured, Measured]:
    """What the model says that stops behind the first loop, and the whole one."""
    half = Anatomy(copy.deepcopy(model))
    half.arrange(list(range(len(half.blocks) // LOOPS)))
    return context.evaluate(half.model, 1.0), context.evaluate(model, 1.0)


@claim(
    "relaxed-recursive/rank",
    method="relaxed-recursive",
    paper="arXiv:2410.20672",
    statement="Before any training, what leaves the blocks is the nearer to what it was the higher the rank of the "
    "corrections, at their mean and behind the last one, and so is the loss.",
)
def rank(context: Context) -> Result:
    """The mean of two blocks with the truncated SVD of what each loses; ranks 0, 4, 16 and 64.

    The distance behind a block is relative: the root of the mean square over the positions of the first batch of
    held-out data. Behind the last block the final norm is counted in.
    """
    _of_even_blocks(context)
    batch = next(iter(context.evaluation))
    dense = _streams(context.model, batch)
    rows = []
    for chosen in RANKS:
        anatomy = context.fresh().anatomy
        model, _ = convert_anatomy(anatomy, Plan("relaxed-recursive", PAPERS | {"rank": chosen}, steps=0))
        off = [
            float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
            for ours, theirs in zip(_streams(model, batch), dense, strict=True)
        ]
        rows.append({
            "rank": chosen, "parameters": parameters(model), "mean distance": mean(off), "distance": off[-1],
            "loss": context.evaluate(model, 1.0).loss,
        })  # fmt: skip
    falls = [all(one[key] > other[key] for one, other in pairwise(rows)) for key in list(rows[0])[2:]]
    told = ", ".join(
        f"{row['mean distance']:.3f} and {row['distance']:.3f} (loss {row['loss']:.4f}) at rank {row['rank']}"
        for row in rows
    )
    return Result(
        Verdict.of(all(falls)),
        f"Distance behind the blocks, mean and last: {told}; dense loss {context.dense.loss:.4f}",
        rows,
    )


@torch.no_grad()
def _streams(model: Any, batch: Any) -> list[torch.Tensor]:
    """What leaves each block (B x T x d), in float32."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return [states.float() for states in model(**inputs, output_hidden_states=True).hidden_states[1:]]
