"""Claims of multi-level training (Zou et al., ICLR 2024, arXiv:2404.07999)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean
from typing import Any

from ...conversion.catalog.multi_level.cycle import Leg, leg, v_cycle
from ...parts import build_model
from ...training import Schedule
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

SIZES: dict[str, Any] = {"hidden": 64, "blocks": 4, "heads": 4, "neurons": 256}
LENGTH, BATCH, RATE, SMALL_RATE = 64, 8, 1e-3, 2e-3
FIRST, SMALL, STEPS, EVERY = 20, 160, 200, 10
ALPHAS, SEEDS = (0.5, 1.0), (0, 1, 2)


@claim(
    "multi-level/v-cycle",
    method="multi-level",
    paper="arXiv:2404.07999",
    statement="A V-cycle reaches the loss of a model trained from scratch with fewer operations, all trainings "
    "counted, and blending with the model as it was (alpha 0.5) ends better than not (alpha 1).",
)
def cycle(context: Context) -> Result:
    """Llamas of four blocks, four heads and width 64 from random weights, against two, two and 32 on the way.

    From scratch: 220 steps. V-cycle: 20 steps of the large model, 160 of the small one at twice the rate, 200 of the
    blended one, the schedule of each its own. The loss to reach is the one with which the model from scratch ends;
    it is looked for every 10 steps of the blended training. Three seeds, of weights and order; means over them.
    """
    context.specimen.require_causal()
    pieces, source = fresh_rows(context, (STEPS + FIRST) * BATCH * LENGTH)
    length = min(LENGTH, max(map(len, pieces)), max(map(len, context.evaluation.texts())))
    training = batches_of(cut(pieces, length, (STEPS + FIRST) * BATCH), BATCH)
    held_out = batches_of(cut(list(context.evaluation.texts()), length, 64), 32)
    if not len(training) or not len(held_out):
        raise NotApplicable("the texts are too short to train on")
    rows = []
    for seed in SEEDS:
        schedule = Schedule(RATE, epochs=STEPS + FIRST, steps=STEPS + FIRST, every=EVERY, seed=seed)
        alone = leg(_fresh(context, seed, length), "from scratch", training, held_out, schedule, context.progress)
        rows.append(_row("from scratch", seed, [alone], alone.course.checks[-1][2]))
        for alpha in ALPHAS:
            _, legs = v_cycle(
                _fresh(context, seed, length), training, held_out, steps=(FIRST, SMALL, STEPS),
                rates=(RATE, SMALL_RATE, RATE), alpha=alpha, seed=seed, every=EVERY, progress=context.progress,
            )  # fmt: skip
            rows.append(_row(f"V-cycle, alpha {alpha:g}", seed, legs, alone.course.checks[-1][2]))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    means = {
        way: {key: mean(row[key] for row in rows if row["way"] == way) for key in rows[0] if key not in ("way", "seed")}
        for way in ways
    }
    scratch, blended, copied = (means[way] for way in ways)
    held = blended["GFLOPs to it"] < scratch["GFLOPs to it"] and blended["loss"] < copied["loss"]
    told = "; ".join(
        f"{way}: ends at {found['loss']:.4f} after {found['GFLOPs']:.0f} GFLOPs, "
        + (
            f"at the loss from scratch after {found['GFLOPs to it']:.0f}, {found['tokens to it']:,.0f} tokens and "
            f"{found['seconds to it']:.0f} s"
            if math.isfinite(found["GFLOPs to it"])
            else "not in all seeds at the loss from scratch"
        )
        for way, found in means.items()
    )
    return Result(Verdict.of(held), f"{told} (means of {len(SEEDS)} seeds, {source})", rows)


def _fresh(context: Context, seed: int, length: int) -> Any:
    vocabulary = context.anatomy.config.vocab_size
    return build_model("llama", seed=seed, vocabulary=vocabulary, length=length, **SIZES).to(context.model.device)


def _row(way: str, seed: int, legs: list[Leg], target: float) -> dict[str, Any]:
    """Where a training ends, and what it costs until its last model has the target's loss; infinite if none."""
    *earlier, last = legs
    reached = next((check[0] for check in last.course.checks if check[2] <= target), math.inf) / last.course.steps

    def until(cost: Callable[[Leg], float]) -> float:
        return sum(map(cost, earlier)) + reached * cost(last)

    return {
        "way": way, "seed": seed, "loss": last.course.checks[-1][2], "GFLOPs": sum(one.cost for one in legs) / 1e9,
        "GFLOPs to it": until(lambda one: one.cost) / 1e9, "tokens to it": until(lambda one: one.course.tokens),
        "seconds to it": until(lambda one: one.course.seconds), "loss before the last training": last.course.before,
    }  # fmt: skip
