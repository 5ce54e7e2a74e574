"""Claims of AlgoFormer (Gao et al., 2024, arXiv:2402.13572)."""

from __future__ import annotations

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
from ..registry import Result, Verdict, claim

SIZES: dict[str, Any] = {"hidden": 64, "blocks": 3, "heads": 2, "neurons": 128, "vocabulary": 1}
TASK: dict[str, Any] = {"dimensions": 2, "points": 10, "noise": 0.0, "features": 3}
TURNS = 8
ORDERS = {"algoformer": order_of(3, [1], TURNS), "loop of all": order_of(3, [0, 1, 2], 3), "no loop": [0, 1, 2]}
STEPS, BATCH, RATE, SEEDS = 250, 32, 3e-3, (0, 1)
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
    blocks without a loop stand beside them and are not judged. The loss is that of the last turn's answers, so what the
    card calls a loss over the last turns is not tried. The model plays no part.
    """
    rows = [{"model": name, "seed": seed, **_trained(order, seed)} for name, order in ORDERS.items() for seed in SEEDS]
    mean = {name: sum(row["loss"] for row in rows if row["model"] == name) / len(SEEDS) for name in ORDERS}
    asked = _drawn(1, TESTED)
    scores = task_named("icl-regression").baselines(asked, **TASK)  # type: ignore[misc]
    best = {name: float(score[asked.asked].mean()) for name, score in scores.items()}
    holds = mean["algoformer"] < mean["loop of all"]
    told = ", ".join(f"{name} {value:.4f}" for name, value in mean.items())
    return Result(
        Verdict.of(holds),
        f"Squared error over all examples, in units of the answers' variance: {told}; least squares on the true "
        f"features {best['least squares']:.4f}, the answer 0 {best['nothing']:.4f}",
        rows,
    )


def _drawn(seed: int, count: int) -> Drawn:
    return task_named("icl-regression").draw(count, seed, TASK)


def _trained(order: list[int], seed: int) -> dict[str, Any]:
    """A model whose blocks stand in this order, trained from new weights."""
    shown, asked = _drawn(2 * seed, STEPS * BATCH), _drawn(1, TESTED)
    length = shown.inputs.shape[1]
    model = built("llama", {}, {}, {**SIZES, "length": length}, shown.vectors, seed)
    Anatomy(model).arrange(order)
    batches, lowered = list(shown.batches(BATCH)), loss_on(model, shown)

    def loss(step: int) -> torch.Tensor:
        summed, count = lowered(batches[step])
        return summed / count

    descend(model, loss, STEPS, RATE)
    return {
        "loss": judged(model, asked, BATCH).loss, "parameters": parameters(model), "blocks run": len(order),
        "operations": flops_of_model(model, length),
    }  # fmt: skip
