"""Claims of SVFit (Sun et al., 2024, arXiv:2409.05926)."""

from __future__ import annotations

from typing import Any

from ...adaptation import Settings
from ...adaptation.targets import targets_of
from ..context import Context, Measured
from ..registry import Result, Verdict, claim

STEPS = 40
BATCH = 4  # sequences in a step
RATES = (0.1, 0.3, 1.0, 3.0)  # each way's best is taken
_SHARE = 8  # of the smaller side of the narrowest matrix, the part that is trained: an eighth
_CLEAR = 2  # standard errors
_WAYS: dict[str, dict[str, Any]] = {
    "leading": {"select": "leading"}, "random": {"select": "random"}, "smallest": {"select": "smallest"},
    "leading, relative": {"select": "leading", "relative": True},
}  # fmt: skip


@claim(
    "svfit/leading",
    method="svfit",
    paper="arXiv:2409.05926",
    statement="Training the leading singular values of each weight lowers the loss more than training as many that are "
    "drawn at random, or the smallest.",
)
def leading(context: Context) -> Result:
    """Values of every linear layer of the blocks, as many in each as an eighth of the narrowest has.

    Calibration data is trained on (give text of another kind than the model's own), but for its last tenth, by which
    each way's rate is chosen; the losses are those of held-out data, errors over its sequences, in pairs. One draw. The
    relative parametrisation is our addition, and not judged.
    """
    context.require_language_model()
    narrowest = min(min(shape) for shape in targets_of(context.anatomy, None).values())
    rank = max(1, narrowest // _SHARE)
    found = {way: _trained(context, {"rank": rank, **settings}) for way, settings in _WAYS.items()}
    best = found["leading"][0]
    rows, failed, unclear = [], [], []
    for way, (measured, rate) in found.items():
        difference, error = best.minus(measured)
        if way in ("random", "smallest"):
            failed += [way] if difference >= 0 else []
            unclear += [way] if abs(difference) < _CLEAR * error else []
        rows.append({
            "trained": way, "values": rank, "rate": rate, "loss": measured.loss,
            "fall": -measured.minus(context.dense)[0], "leading minus this": difference, "standard error": error,
        })  # fmt: skip
    told = ", ".join(f"{row['trained']} {row['loss']:.4f}" for row in rows)
    if all(row["fall"] <= 0 for row in rows):
        reason = f"No way lowers the loss ({told}): the model knows this text. Give text of another kind."
        return Result(Verdict.NOT_APPLICABLE, reason, rows)
    against = f" Not below {' and '.join(failed)}." if failed else ""
    chance = f" Within {_CLEAR} standard errors: {' and '.join(unclear)}." if unclear else ""
    verdict = Verdict.of(not failed)
    return Result(verdict, f"From {context.dense.loss:.4f}, by what is trained: {told}.{against}{chance}", rows)


def _trained(context: Context, options: dict[str, Any]) -> tuple[Measured, float]:
    """The loss on held-out data after training at the best rate, and that rate."""
    from ...adaptation.adapt import adapt_anatomy  # peft takes a second to import

    chosen: tuple[float, float, Any] | None = None
    for rate in RATES:
        anatomy = context.fresh().anatomy
        settings = Settings("svfit", options, lr=rate, epochs=STEPS, steps=STEPS, batch_size=BATCH)
        _, outcome = adapt_anatomy(anatomy, settings, context.calibration, progress=context.progress)
        if chosen is None or outcome["loss_after"] < chosen[0]:
            chosen = outcome["loss_after"], rate, anatomy.model
    assert chosen is not None
    return context.evaluate(chosen[2], 1.0), chosen[1]
