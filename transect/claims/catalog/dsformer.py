"""Claims of DSFormer (Chand, Prabhu and Kumar, 2023, arXiv:2312.13211), before training and after."""

from __future__ import annotations

from math import floor
from typing import Any, NamedTuple

from ...adaptation import Settings
from ...anatomy.storage import is_dense
from ...compression import Recipe, compress_anatomy
from ...compression import method as registered
from ...compression.copying import working_copy
from ...errors import OutOfReach
from ..context import Context, Measured, Variant
from ..ordering import KEEPS, at_budgets, beside_dense, comparison, judge
from ..registry import NotApplicable, Result, Verdict, claim

SVD = registered("svd")
SVD_ROW = Variant(SVD)

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
    """Mean of ||W - Ŵ||² / ||W||² over matrices, each at the largest size that the budget pays for in either form.

    Those are left out that stay dense for the bytes that the sizes of the others leave over.
    """
    numbers: list[dict[str, Any]] = []
    for keep in context.budgets(KEEPS):
        context.require_keep(keep)
        ours, theirs = _projected(context, keep).left, {}
        for matrix in (matrix for matrix in context.matrices if matrix.name in ours):
            d_out, d_in = matrix.shape
            rank = floor(keep * d_out * d_in / (d_out + d_in))
            total = float(matrix.weight.detach().double().square().sum())
            theirs[matrix.name] = float(context.factors(SVD)[matrix.name].losses()[rank]) / total
        means = {name: sum(left.values()) / len(left) for name, left in (("dsformer", ours), ("svd", theirs))}
        lower = sum(one < theirs[name] for name, one in ours.items())
        numbers.append(
            {"keep": keep, **means, "matrices": len(ours), "lower_in": lower, "held": means["dsformer"] < means["svd"]}
        )
    held = sum(row["held"] for row in numbers)
    told = ", ".join(f"{row['dsformer']:.3f} against {row['svd']:.3f} at {row['keep']:g}" for row in numbers)
    told = f"Lower in the mean over the matrices at {held} of {len(numbers)} budgets: {told}"
    return at_budgets(context, Result(Verdict.of(held == len(numbers)), told, numbers))


@claim(
    "dsformer/projection-below-svd",
    method="dsformer",
    paper="Transect's own",
    statement="Without training, the dense-sparse projection loses less than plain SVD of the same bytes.",
    uses=["svd", "dsformer"],
)
def projection_below_svd(context: Context) -> Result:
    """What the paper claims is about models trained in either form; this is where that training would begin."""
    for keep in context.budgets(KEEPS):
        context.require_keep(keep)
    found = [
        comparison(keep, ("dsformer", _projected(context, keep).measured), ("svd", context.compressed(SVD_ROW, keep)))
        for keep in context.budgets(KEEPS)
    ]
    return at_budgets(context, beside_dense(context, judge(found)))


class Projected(NamedTuple):
    """The loss of the model with its matrices projected, and what is left of the squares of each, by its name."""

    measured: Measured
    left: dict[str, float]


def _projected(context: Context, keep: float) -> Projected:
    """Both claims that need it share it, since it takes long."""
    known: dict[float, Projected] = context.shared.setdefault("dsformer", {})
    if keep not in known:
        anatomy = working_copy(context.anatomy)
        matrices = anatomy.matrices()
        try:
            outcome = compress_anatomy(anatomy, Recipe("dsformer", keep), progress=context.progress)
        except OutOfReach as reason:
            raise NotApplicable(f"the model is too small: {reason}") from None
        left = {}
        for dense, made in zip(context.matrices, matrices, strict=True):
            if not is_dense(made.module):
                weight = dense.weight.double()
                difference = weight - made.weight.double()
                left[dense.name] = float(difference.square().sum() / weight.square().sum())
        known[keep] = Projected(context.evaluate(anatomy.model, outcome["kept"]), left)
    return known[keep]


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
