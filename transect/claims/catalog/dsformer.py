"""Claims of DSFormer (Chand, Prabhu and Kumar, 2023, arXiv:2312.13211), before any training."""

from __future__ import annotations

from math import floor
from typing import Any

from ...compression import method as registered
from ...errors import OutOfReach
from ..context import Context, Variant
from ..ordering import KEEPS, claim_order
from ..registry import NotApplicable, Result, Verdict, claim

DSFORMER, SVD = registered("dsformer"), registered("svd")


@claim(
    "dsformer/weight-error",
    method="dsformer",
    paper="Transect's own",
    statement="At the same stored bytes, the dense-sparse projection leaves less of the weights' squares than SVD.",
    uses=["svd", "dsformer"],
)
def weight_error(context: Context) -> Result:
    """Σ ||W - Ŵ||² / ||W||² over all matrices, each at the largest size that the budget pays for in either form."""
    numbers: list[dict[str, Any]] = []
    for keep in KEEPS:
        context.require_keep(keep)
        ours, theirs = [], []
        for matrix in context.matrices:
            weight, (d_out, d_in) = matrix.weight.detach().double(), matrix.shape
            settings = DSFORMER.settings({})
            assert DSFORMER.plan is not None
            try:
                size = DSFORMER.plan(matrix.shape, matrix.module.weight.element_size(), keep, **settings)
            except OutOfReach as reason:
                raise NotApplicable(f"the model is too small: {reason}") from None
            made = DSFORMER.function(weight, **size.chosen, **settings)
            total = float(weight.square().sum())
            ours.append(float((weight - made.to_dense().detach()).square().sum()) / total)
            rank = floor(keep * d_out * d_in / (d_out + d_in))
            theirs.append(float(context.factors(SVD)[matrix.name].losses()[rank]) / total)
        lower = sum(one < other for one, other in zip(ours, theirs, strict=True))
        count = len(ours)
        numbers.append(
            {"keep": keep, "dsformer": sum(ours) / count, "svd": sum(theirs) / count, "matrices": count,
             "lower_in": lower, "held": sum(ours) < sum(theirs)}
        )  # fmt: skip
    held = sum(row["held"] for row in numbers)
    told = ", ".join(f"{row['dsformer']:.3f} against {row['svd']:.3f} at {row['keep']:g}" for row in numbers)
    return Result(
        Verdict.HOLDS if held == len(numbers) else Verdict.DOES_NOT_HOLD,
        f"Lower in the mean over the matrices at {held} of {len(numbers)} budgets: {told}",
        numbers,
    )


# What the paper claims is about models trained in either form; this is where that training would begin.
claim_order(
    "dsformer/projection-below-svd", (Variant(DSFORMER), Variant(SVD)),
    paper="Transect's own",
    statement="Without training, the dense-sparse projection loses less than plain SVD of the same bytes.",
    any_task=True,
)  # fmt: skip
