"""Claims of FWSVD (Hsu et al., ICLR 2022, arXiv:2207.00112) and of the papers that compare with it."""

from __future__ import annotations

from ...compression import Method
from ...compression import method as registered
from ...compression.allocation.table import uniform_rank
from ..context import Context, Variant
from ..ordering import KEEPS, at_budgets, claim_order, compare
from ..registry import Result, Verdict, claim

PAPER = registered("fwsvd").paper
SVD, FWSVD, SVD_LLM = registered("svd"), registered("fwsvd"), registered("svd-llm")


# The paper's headline, without its fine-tuning.
claim_order(
    "fwsvd/below-svd", (Variant(FWSVD, "uniform"), Variant(SVD)),
    paper=PAPER,
    statement="At the same size, FWSVD loses less than plain SVD.",
    any_task=True,
)  # fmt: skip


# From SVD-LLM's table of perplexities.
claim_order(
    "fwsvd/above-svd-llm", (Variant(SVD_LLM), Variant(FWSVD, "uniform")),
    paper=SVD_LLM.paper,
    statement="At the same size, FWSVD loses more than SVD-LLM.",
)  # fmt: skip


@claim(
    "fwsvd/weight-error",
    method="fwsvd",
    paper=PAPER,
    statement="FWSVD's loss is closer to the dense model's although its weights are farther from it than plain SVD's.",
    uses=["svd", "fwsvd"],
)
def weight_error(context: Context) -> Result:
    """Plain SVD is the nearest matrix of its rank, so only the second half can fail for other reasons than rounding."""
    numbers, held = [], 0
    for keep in context.budgets(KEEPS):
        context.require_keep(keep)
        errors = {name: _weight_errors(context, method, keep) for name, method in (("fwsvd", FWSVD), ("svd", SVD))}
        nearer = sum(a < b * (1 - 1e-6) for a, b in zip(errors["fwsvd"], errors["svd"], strict=True))
        losses = compare(context, Variant(FWSVD, "uniform"), Variant(SVD), keep)
        farther = nearer == 0 and sum(errors["fwsvd"]) > sum(errors["svd"])
        held += farther and losses.difference < 0
        numbers.append({
            "keep": keep, "fwsvd_weight_error": sum(errors["fwsvd"]), "svd_weight_error": sum(errors["svd"]),
            "matrices_nearer_than_svd": nearer, "fwsvd_loss": losses.better_loss, "svd_loss": losses.worse_loss,
            "difference": losses.difference, "standard_error": losses.standard_error, "clear": losses.clear,
        })  # fmt: skip
    told = f"A larger weight error and a lower loss at {held} of {len(numbers)} budgets."
    return at_budgets(context, Result(Verdict.of(held == len(numbers)), told, numbers))


def _weight_errors(context: Context, method: Method, keep: float) -> list[float]:
    """||W - Ŵ||² of every matrix, as a share of all matrices' summed ||W||²."""
    total = sum(float(matrix.weight.double().square().sum()) for matrix in context.matrices)
    found = []
    for matrix in context.matrices:
        left, right = context.factors(method)[matrix.name].truncate(uniform_rank(matrix.shape, keep))
        found.append(float((matrix.weight.double() - left.double() @ right.double()).square().sum()) / total)
    return found
