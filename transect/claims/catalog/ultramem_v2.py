"""Claims of UltraMemV2 (Huang et al., ICLR 2026, arXiv:2508.18756)."""

from __future__ import annotations

from ...parts.catalog.ultramem_v2 import UltraMem
from ..context import Context
from ..parts_from_scratch import SIZES, trained_from_scratch
from ..registry import Result, Verdict, claim

STEPS, SEEDS, NEURONS = 200, (0, 1), 128
SETTINGS = {"side": 32, "top": 8}


@claim(
    "ultramem-v2/below-dense",
    method="ultramem-v2",
    paper="arXiv:2508.18756",
    statement="Trained from scratch with as many operations a position, a model with a memory beside every MLP reaches "
    "a lower loss than one with larger MLPs.",
)
def below_dense(context: Context) -> Result:
    """Scaled down: width 64, two blocks, 1,024 slots a layer of which 8 are read, 200 steps. The paper's gains come
    late in long trainings."""
    numbers = []
    for seed in SEEDS:
        model = trained_from_scratch(
            context, STEPS, seed, {"block": "ultramem-v2"}, settings={"ultramem-v2": SETTINGS}, neurons=NEURONS
        )
        flops = max(part.flops for part in model.modules() if isinstance(part, UltraMem))
        larger = NEURONS + round(flops / (2 * 3 * SIZES["hidden"]))  # a neuron of a gated MLP has three rows
        memory = context.evaluate(model, 1.0)
        dense = context.evaluate(trained_from_scratch(context, STEPS, seed, neurons=larger), 1.0)
        difference, error = memory.minus(dense)
        numbers.append({"seed": seed, "memory": memory.loss, "dense": dense.loss, "dense_neurons": larger,
                        "difference": difference, "standard_error": error})  # fmt: skip
    held = [row["difference"] < 0 for row in numbers]
    return Result(
        Verdict.of(all(held)),
        f"Lower from {sum(held)} of {len(held)} seeds, after {STEPS} steps",
        numbers,
    )
