"""Claims of DSFormer (Chand, Prabhu and Kumar, 2023, arXiv:2312.13211), before training and after."""

from __future__ import annotations

from math import floor
from typing import Any

from ...adaptation import Settings
from ...compression import Recipe, compress_anatomy
from ...compression import method as registered
from ...errors import OutOfReach
from ..context import Context, Measured, Variant
from ..ordering import KEEPS, claim_order
from ..registry import NotApplicable, Result, Verdict, claim

DSFORMER, SVD = registered("dsformer"), registered("svd")

KEEP = 0.5  # of the matrices' bytes, in training
STEPS = 30
BATCH = 4  # sequences in a step
RATES = (3e-4, 1e-3)  # each way's best is taken
SETTINGS: dict[str, Any] = {"keep": KEEP, "iterations": 5, "refresh": 10}
_CLEAR = 2  # standard errors


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
        Verdict.of(held == len(numbers)),
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


@claim(
    "dsformer/training",
    method="dsformer",
    paper="arXiv:2312.13211",
    statement="At the same stored bytes a model trained through the projection to dense-sparse factors loses no more "
    "than one whose factors are trained themselves on a support that stays, and that no more than trained low-rank "
    "factors.",
    uses=["svd"],
)
def training(context: Context) -> Result:
    """Every matrix at half of its bytes: STF, variant F, and low-rank factors of plain SVD; 30 steps of each.

    Everything else in the model is trained, too. Calibration data is trained on, but for its last tenth, by which each
    way's rate is chosen of two; the losses are those of held-out data, errors over its sequences, in pairs. The paper
    trains for a task, for epochs, and measures accuracy.
    """
    context.require_language_model()
    context.require_keep(KEEP)
    found = {way: _trained(context, way) for way in ("stf", "f", "low rank")}
    rows, against, unclear = [], [], []
    for way, (measured, rate, kept) in found.items():
        row: dict[str, Any] = {"trained": way, "kept": kept, "rate": rate, "loss": measured.loss}
        below = {"stf": "f", "f": "low rank"}.get(way)
        if below is not None:
            difference, error = measured.minus(found[below][0])
            row |= {"against": below, "difference": difference, "standard error": error}
            against += [f"{way} is above {below}"] if difference > 0 else []
            unclear += [f"{way} and {below}"] if abs(difference) < _CLEAR * error else []
        rows.append(row)
    told = ", ".join(f"{row['trained']} {row['loss']:.4f}" for row in rows)
    chance = f" Within {_CLEAR} standard errors: {'; '.join(unclear)}." if unclear else ""
    return Result(
        Verdict.DOES_NOT_HOLD if against else Verdict.HOLDS,
        f"From a dense loss of {context.dense.loss:.4f}: {told}.{''.join(f' {one}.' for one in against)}{chance}",
        rows,
    )


def _trained(context: Context, way: str) -> tuple[Measured, float, float]:
    """The loss on held-out data after training at the best rate, that rate, and the share of the bytes."""
    from ...adaptation.adapt import adapt_anatomy  # peft takes a second to import

    chosen: tuple[float, float, Any] | None = None
    for rate in RATES:
        anatomy, method, options = context.fresh().anatomy, "full", {}
        if way == "low rank":
            compress_anatomy(anatomy, Recipe("svd", KEEP))
        else:
            method, options = "dsformer", {"variant": way, **SETTINGS}
        settings = Settings(method, options, lr=rate, epochs=STEPS, steps=STEPS, batch_size=BATCH)
        _, outcome = adapt_anatomy(anatomy, settings, context.calibration, progress=context.progress)
        if chosen is None or outcome["loss_after"] < chosen[0]:
            chosen = outcome["loss_after"], rate, anatomy
    assert chosen is not None
    anatomy = chosen[2]
    kept = anatomy.matrix_bytes() / context.fresh().anatomy.matrix_bytes()
    return context.evaluate(anatomy.model, kept), chosen[1], kept
