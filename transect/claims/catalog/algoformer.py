"""Claims of AlgoFormer (Gao et al., 2024, arXiv:2402.13572)."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch

from ...anatomy import Anatomy
from ...contest.parts.judging import judged, loss_on
from ...contest.parts.sizes import built, flops_of_model
from ...conversion.catalog.algoformer import order_of
from ...evaluation import parameters
from ...tasks import Drawn, task_named
from ..context import Context
from ..descent import descend
from ..pairs import paired
from ..registry import Result, Verdict, claim

SIZES: dict[str, Any] = {"hidden": 64, "blocks": 3, "heads": 2, "neurons": 128, "vocabulary": 1}
TASK: dict[str, Any] = {"dimensions": 2, "points": 10, "noise": 0.0, "features": 3}
TURNS = 8
OTHERS = (4, 12, 18)  # turns with which the trained loop is run besides
ORDERS = {"algoformer": order_of(3, [1], TURNS), "loop of all": order_of(3, [0, 1, 2], 3), "no loop": [0, 1, 2]}
STEPS, BATCH, RATE, SEEDS = 250, 32, 3e-3, (0, 1, 2, 3, 4)
TESTED = 512


@claim(
    "algoformer/features",
    method="algoformer",
    paper="arXiv:2402.13572",
    statement="On regression in the features of a fixed network, from examples in the prompt, one block before a loop "
    "of one and one behind it have a smaller error than a plain loop of three blocks with as many parameters.",
)
def features(context: Context) -> Result:
    """Scaled down: width 64, inputs of 2 dimensions in 3 features, 10 examples, no noise; 250 steps of 32 prompts.

    The loop of one block has 8 turns, that of three 3, so that both run about as many blocks (10 and 9); the three
    blocks without a loop stand beside them and are not judged; smaller is by two standard errors over seeds. The loss
    is that of the last turn's answers: one over the last turns, which is to make more of them harmless, is not tried.
    The model plays no part.
    """
    rows = [{"model": name, "seed": seed, **_trained(name, seed)} for name in ORDERS for seed in SEEDS]
    found = {name: [row["loss"] for row in rows if row["model"] == name] for name in ORDERS}
    asked = _drawn(1, TESTED)
    scores = task_named("icl-regression").baselines(asked, **TASK)  # type: ignore[misc]
    best = {name: float(score[asked.asked].mean()) for name, score in scores.items()}
    difference, error = paired(found["algoformer"], found["loop of all"])
    told = ", ".join(f"{name} {mean(each):.4f}" for name, each in found.items())
    longer = ", ".join(
        f"{mean(row[_turned(times)] for row in rows if row['model'] == 'algoformer'):.4f} after {times}"
        for times in OTHERS
    )
    return Result(
        Verdict.of(difference + 2 * error < 0),
        f"Squared error over all examples, in units of the answers' variance, {len(SEEDS)} seeds: {told} (algoformer "
        f"against the loop of all {difference:+.4f} ± {error:.4f}); least squares on the true features "
        f"{best['least squares']:.4f}, the answer 0 {best['nothing']:.4f}. With another number of turns than the "
        f"{TURNS} that were trained, algoformer's is {longer}",
        rows,
    )


def _drawn(seed: int, count: int) -> Drawn:
    return task_named("icl-regression").draw(count, seed, TASK)


def _turned(times: int) -> str:
    return f"loss with {times} turns"


def _trained(name: str, seed: int) -> dict[str, Any]:
    """A model whose blocks stand in the order of that name, trained from new weights."""
    order, shown, asked = ORDERS[name], _drawn(2 * seed, STEPS * BATCH), _drawn(1, TESTED)
    length = shown.inputs.shape[1]
    model = built("llama", {}, {}, {**SIZES, "length": length}, shown.vectors, seed)
    Anatomy(model).arrange(order)
    batches, lowered = list(shown.batches(BATCH)), loss_on(model, shown)

    def loss(step: int) -> torch.Tensor:
        summed, count = lowered(batches[step])
        return summed / count

    descend(model, loss, STEPS, RATE)
    found: dict[str, Any] = {
        "loss": judged(model, asked, BATCH).loss, "parameters": parameters(model), "blocks run": len(order),
        "operations": flops_of_model(model, length),
    }  # fmt: skip
    for times in OTHERS if name == "algoformer" else ():
        Anatomy(model).arrange([0, *[1] * times, len(Anatomy(model).blocks) - 1])
        found[_turned(times)] = judged(model, asked, BATCH).loss
    return found
