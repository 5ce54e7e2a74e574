"""Claim of PST (Li et al., IJCAI 2022, arXiv:2205.11005)."""

from __future__ import annotations

from typing import Any

from ...adaptation import Settings
from ..context import Context, Measured
from ..registry import Result, Verdict, claim

STEPS = 60
BATCH = 4  # sequences in a step
RATES = (3e-3, 1e-2)  # each way's best is taken
SPARSITY = 0.9
RANK = 8  # of the update, and of the scores
PST, MAGNITUDE = "pst", "magnitude and a low-rank update"
# The scores' numbers go to the update: (r₁ + r₂ + 1)(d_out + d_in) in both.
_WAYS: dict[str, dict[str, Any]] = {
    PST: {"weight_rank": RANK, "score_rank": RANK},
    MAGNITUDE: {"weight_rank": 2 * RANK + 1, "score_rank": 1, "alpha1": 0.0, "alpha2": 0.0},
}


@claim(
    "pst/learned-scores",
    method="pst",
    paper="arXiv:2205.11005",
    statement="At 90 % sparsity, learned low-rank scores and a low-rank update lower the loss further than pruning by "
    "the size of the weights with a low-rank update of as many trained numbers.",
)
def learned_scores(context: Context) -> Result:
    """All linear layers of the blocks, the same schedule of the sparsity, the same sequences in the same order.

    Calibration data is trained on, but for its last tenth, by which each way's rate is chosen; the losses are those of
    held-out data, errors over its sequences, in pairs. One seed.
    """
    context.require_language_model()
    found = {way: _trained(context, {"sparsity": SPARSITY, **settings}) for way, settings in _WAYS.items()}
    ours, rows = found[PST][0], []
    for way, (measured, row) in found.items():
        difference, error = ours.minus(measured)
        rows.append(
            {"trained": way, **row, "loss": measured.loss, "pst minus this": difference, "standard error": error}
        )
    difference, error = ours.minus(found[MAGNITUDE][0])
    return Result(
        Verdict.of(difference < 0),
        f"At {SPARSITY:.0%} sparsity {ours.loss:.4f} against {found[MAGNITUDE][0].loss:.4f} ({difference:+.4f}, "
        f"standard error {error:.4f}), from {context.dense.loss:.4f} of the dense model",
        rows,
    )


def _trained(context: Context, options: dict[str, Any]) -> tuple[Measured, dict[str, Any]]:
    """The loss on held-out data after training at the best rate; that rate, and what is trained and stored."""
    from ...adaptation.adapt import adapt_anatomy  # peft takes a second to import

    chosen: tuple[float, float, Any, int] | None = None
    for rate in RATES:
        anatomy = context.fresh().anatomy
        whole = anatomy.matrix_bytes()
        settings = Settings("pst", options, lr=rate, epochs=STEPS, steps=STEPS, batch_size=BATCH)
        _, outcome = adapt_anatomy(anatomy, settings, context.calibration, progress=context.progress)
        if chosen is None or outcome["loss_after"] < chosen[0]:
            chosen = outcome["loss_after"], rate, anatomy, outcome["trained"]
    assert chosen is not None
    _, rate, anatomy, numbers = chosen
    kept = anatomy.matrix_bytes() / whole
    return context.evaluate(anatomy.model, kept), {"numbers": numbers, "rate": rate, "kept": kept}
