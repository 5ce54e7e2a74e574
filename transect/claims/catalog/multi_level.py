"""Claims of multi-level training (Zou et al., ICLR 2024, arXiv:2404.07999)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ...conversion.catalog.multi_level.cycle import Leg, leg, v_cycle
from ...parts import build_model
from ...training import Schedule
from ..context import Context
from ..pairs import paired
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

SIZES: dict[str, Any] = {"hidden": 64, "blocks": 4, "heads": 4, "neurons": 256}
LENGTH, BATCH, RATE, SMALL_RATE = 64, 8, 1e-3, 2e-3
FIRST, SMALL, STEPS, EVERY = 20, 160, 200, 10
ALPHAS, SEEDS = (0.5, 1.0), (0, 1, 2)


@dataclass
class Trained:
    """Everything that the claims train, a list of one for each seed, on the same data in the same order.

    scratch: the large model. cycles: alpha -> the three trainings of a V-cycle. random: the small model, from random
    numbers, as it is trained in a cycle. source: where the text is from.
    """

    scratch: list[Leg]
    cycles: dict[float, list[list[Leg]]]
    random: list[Leg]
    source: str


def trained(context: Context) -> Trained:
    """All of them, once for all claims."""
    if "multi-level" not in context.shared:
        context.shared["multi-level"] = _trained(context)
    return context.shared["multi-level"]


def _trained(context: Context) -> Trained:
    context.specimen.require_causal()
    pieces, source = fresh_rows(context, (STEPS + FIRST) * BATCH * LENGTH)
    length = min(LENGTH, max(map(len, pieces)), max(map(len, context.evaluation.texts())))
    training = batches_of(cut(pieces, length, (STEPS + FIRST) * BATCH), BATCH)
    held_out = batches_of(cut(list(context.evaluation.texts()), length, 64), 32)
    if not len(training) or not len(held_out):
        raise NotApplicable("the texts are too short to train on")
    found = Trained([], {alpha: [] for alpha in ALPHAS}, [], source)
    for seed in SEEDS:
        schedule = Schedule(RATE, epochs=STEPS + FIRST, steps=STEPS + FIRST, every=EVERY, seed=seed)
        large = _fresh(context, seed, length)
        found.scratch.append(leg(large, "from scratch", training, held_out, schedule, context.progress))
        for alpha in ALPHAS:
            _, legs = v_cycle(
                _fresh(context, seed, length), training, held_out, steps=(FIRST, SMALL, STEPS),
                rates=(RATE, SMALL_RATE, RATE), alpha=alpha, seed=seed, every=EVERY, progress=context.progress,
            )  # fmt: skip
            found.cycles[alpha].append(legs)
        small = _fresh(context, seed, length, half=True)
        schedule = Schedule(SMALL_RATE, epochs=SMALL, steps=SMALL, every=EVERY, seed=seed + 1)  # as in the cycle
        found.random.append(leg(small, "small", training, held_out, schedule, context.progress))
    return found


def _reached(rows: list[dict[str, Any]]) -> str:
    """What it took, over the seeds."""
    if not all(math.isfinite(row["GFLOPs to it"]) for row in rows):
        return "not in all seeds"
    work, tokens, seconds = (mean(row[f"{name} to it"] for row in rows) for name in ("GFLOPs", "tokens", "seconds"))
    return f"after {work:.0f} GFLOPs, {tokens:,.0f} tokens and {seconds:.0f} s"


def _end(one: Leg) -> float:
    """The held-out loss with which a training ends."""
    return one.course.checks[-1][2]


@claim(
    "multi-level/v-cycle",
    method="multi-level",
    paper="arXiv:2404.07999",
    statement="A V-cycle reaches the loss of a model trained from scratch with fewer operations, all trainings "
    "counted.",
)
def cycle(context: Context) -> Result:
    """Llamas of four blocks, four heads and width 64 from random weights, against two, two and 32 on the way.

    From scratch: 220 steps. V-cycle: 20 steps of the large model, 160 of the small one at twice the rate, 200 of the
    blended one, the schedule of each its own. The loss to reach is the one with which the model from scratch ends; it
    is looked for every 10 steps of the blended training. Judged with the released blending (alpha 0.5), by two standard
    errors over three seeds, of weights and order; without any (alpha 1) stands beside it.
    """
    found = trained(context)
    rows = [_row("from scratch", seed, [one], _end(one)) for seed, one in zip(SEEDS, found.scratch, strict=True)]
    for alpha, cycles in found.cycles.items():
        for seed, legs, alone in zip(SEEDS, cycles, found.scratch, strict=True):
            rows.append(_row(f"V-cycle, alpha {alpha:g}", seed, legs, _end(alone)))
    ways = {way: [row for row in rows if row["way"] == way] for way in dict.fromkeys(row["way"] for row in rows)}
    scratch, blended, _ = ([row["GFLOPs to it"] for row in of] for of in ways.values())
    held, fewer = all(map(math.isfinite, blended)), ""
    if held:
        difference, error = paired(blended, scratch)
        held = difference + 2 * error < 0
        fewer = f". With alpha {ALPHAS[0]:g} that is {difference:+.0f} ± {error:.0f} GFLOPs against from scratch"
    told = "; ".join(f"{way} {_reached(of)}" for way, of in ways.items())
    return Result(
        Verdict.of(held),
        f"At the loss from scratch, {mean(map(_end, found.scratch)):.4f}: {told} (means of {len(SEEDS)} seeds, "
        f"{found.source}){fewer}",
        rows,
    )


@claim(
    "multi-level/blending",
    method="multi-level",
    paper="arXiv:2404.07999",
    statement="A V-cycle that blends the grown model with the one before (alpha 0.5) ends at a lower loss than one "
    "that does not (alpha 1).",
)
def blending(context: Context) -> Result:
    """Where: see v-cycle. By two standard errors over seeds; the same steps of the same batches behind the blend."""
    cycles = trained(context).cycles
    ends = {f"alpha {alpha:g}": [_end(legs[-1]) for legs in cycles[alpha]] for alpha in ALPHAS}
    return _lower(ends, "The V-cycle ends at")


@claim(
    "multi-level/coalesced-start",
    method="multi-level",
    paper="arXiv:2404.07999",
    statement="The small model ends its training at a lower loss if it began as what the large one was coalesced to "
    "than if it began at random.",
)
def coalesced_start(context: Context) -> Result:
    """Where: see v-cycle; 160 steps of the same batches at the same rates. The large model was trained for 20 steps
    before, which are not made up for. By two standard errors over seeds.
    """
    found = trained(context)
    ends = {"coalesced": [_end(legs[1]) for legs in found.cycles[ALPHAS[0]]], "random": list(map(_end, found.random))}
    return _lower(ends, "The small model ends at")


def _lower(ends: dict[str, list[float]], said: str) -> Result:
    """Whether the first ends clearly below the second."""
    difference, error = paired(*ends.values())
    told = ", ".join(f"{mean(each):.4f} ({way})" for way, each in ends.items())
    rows: list[dict[str, Any]] = [
        {"way": way, "seed": seed, "loss": loss}
        for way, each in ends.items()
        for seed, loss in zip(SEEDS, each, strict=True)
    ]
    return Result(
        Verdict.of(difference + 2 * error < 0),
        f"{said} {told}: {difference:+.4f} ± {error:.4f} over {len(SEEDS)} seeds",
        [*rows, {"difference": difference, "standard error": error}],
    )


def _fresh(context: Context, seed: int, length: int, half: bool = False) -> Any:
    """half: of half the width and depth, as the small model is."""
    sizes = {name: size // 2 for name, size in SIZES.items()} if half else SIZES
    vocabulary = context.anatomy.config.vocab_size
    return build_model("llama", seed=seed, vocabulary=vocabulary, length=length, **sizes).to(context.model.device)


def _row(way: str, seed: int, legs: list[Leg], target: float) -> dict[str, Any]:
    """Where a training ends, and what it costs until its last model has the target's loss; infinite if none."""
    *earlier, last = legs
    reached = next((check[0] for check in last.course.checks if check[2] <= target), math.inf) / last.course.steps

    def until(cost: Callable[[Leg], float]) -> float:
        return sum(map(cost, earlier)) + reached * cost(last)

    return {
        "way": way, "seed": seed, "loss": _end(last), "GFLOPs": sum(one.cost for one in legs) / 1e9,
        "GFLOPs to it": until(lambda one: one.cost) / 1e9, "tokens to it": until(lambda one: one.course.tokens),
        "seconds to it": until(lambda one: one.course.seconds), "loss before the last training": last.course.before,
    }  # fmt: skip
