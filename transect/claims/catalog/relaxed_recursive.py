"""Claims of Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ...conversion import Plan, convert_anatomy
from ...evaluation import parameters
from ...forward import task_of
from ..context import Context, Measured
from ..registry import NotApplicable, Result, Verdict, claim

LOOPS = 2
PAPERS: dict[str, Any] = {"loops": LOOPS, "norms": "shared"}
STEPS, BATCH, RATE = 60, 4, 1e-3
RANKS = (0, 4, 16, 64)
RANK = 16  # of those that are trained, moderate for a width of some hundreds
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
    to follow, or the training's loss itself is at issue.
    """
    _of_even_blocks(context)
    found: dict[str, Measured] = {}
    rows = []
    for way, settings in WAYS.items():
        found[way], row = _trained(context, way, settings)
        rows.append({"way": way, **row, "loss": found[way].loss})
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
    "relaxed-recursive/rank",
    method="relaxed-recursive",
    paper="arXiv:2410.20672",
    statement="Before any training, what leaves the last block is the nearer to what it was the higher the rank of the "
    "corrections, and so is the loss.",
)
def rank(context: Context) -> Result:
    """The mean of two blocks with the truncated SVD of what each loses; ranks 0, 4, 16 and 64.

    The distance is relative: the root of the mean square over the positions of the first batch of held-out data.
    """
    _of_even_blocks(context)
    batch = next(iter(context.evaluation))
    dense = _stream(context.model, batch)
    rows = []
    for chosen in RANKS:
        anatomy = context.fresh().anatomy
        model, _ = convert_anatomy(anatomy, Plan("relaxed-recursive", PAPERS | {"rank": chosen}, steps=0))
        off = float((_stream(model, batch) - dense).square().mean().sqrt() / dense.square().mean().sqrt())
        rows.append({
            "rank": chosen, "parameters": parameters(model), "distance": off, "loss": context.evaluate(model, 1.0).loss,
        })  # fmt: skip
    falls = [all(one[key] > other[key] for one, other in pairwise(rows)) for key in ("distance", "loss")]
    told = ", ".join(f"{row['distance']:.3f} (loss {row['loss']:.4f}) at rank {row['rank']}" for row in rows)
    return Result(
        Verdict.of(all(falls)),
        f"Distance of the last states: {told}; dense loss {context.dense.loss:.4f}",
        rows,
    )


@torch.no_grad()
def _stream(model: Any, batch: Any) -> torch.Tensor:
    """The last hidden states (B x T x d), in float32."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, output_hidden_states=True).hidden_states[-1].float()
