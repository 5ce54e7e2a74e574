"""Claim of feature neurons (Davies, arXiv:2501.02688)."""

from __future__ import annotations

from typing import Any

from ..probes import probe
from ..probes.catalog.feature_neurons import decode
from ..probes.clamping import Chosen, Effects, clamp_effects, short_text
from ..probes.neurons import Vector, kinds_of, unembedding
from .context import Context
from .registry import NotApplicable, Result, Verdict, claim

NEURONS, CONTROLS = 16, 6
STRENGTHS = (1.0, 4.0, 16.0)  # times the usual size of the neuron's up-projection
DECODED: tuple[tuple[Vector, tuple[float, ...]], ...] = (("up", STRENGTHS), ("down", STRENGTHS[1:2]))
PROBE = probe("feature-neurons")


@claim(
    "feature-neurons/own-token",
    method="feature-neurons",
    paper=PROBE.paper,
    statement="Holding an MLP neuron at a large value makes the token that its up-projection decodes to more likely, "
    "more than holding a random neuron of the block with as large an output does.",
)
def own_token(context: Context) -> Result:
    """The neurons that stand out most, each against random ones; at three strengths, and by its output for comparison.

    The paper shows examples; the average over neurons, the controls and the strengths are our design. It holds where
    the mean difference from the controls is above two standard errors over the neurons, at strength 4 and at 16.
    """
    context.require_language_model()
    specimen = context.fresh()
    ids, kinds = short_text(specimen), kinds_of(specimen.anatomy.blocks)
    if not kinds:
        raise NotApplicable("no block of this model has an MLP left")
    decoded = decode(specimen, unembedding(specimen.lens), kinds, top=1)
    rows: list[dict[str, Any]] = []
    for kind, strengths in DECODED:
        places = decoded.ranked(NEURONS, (kind,), (0, 1) if "gate" in kinds else (0,))
        chosen = [Chosen(place[2], place[3], 1 - 2 * place[1], int(decoded.tokens[place][0])) for place in places]
        if len(chosen) < 2:
            raise NotApplicable(f"only {len(chosen)} neurons decode to tokens of their own")
        for strength in strengths:
            rows.append(_row(kind, strength, clamp_effects(specimen, chosen, ids, strength, CONTROLS)))
    judged = [row for row in rows if row["decoded by"] == "up" and row["strength"] > 1]
    holds = all(row["difference"] > 2 * row["standard error"] for row in judged)
    listed = "; ".join(
        f"{row['own token, nats']:+.3f} against {row['random neurons, nats']:+.3f} ({row['difference']:+.3f} "
        f"± {row['standard error']:.3f}) at {row['strength']:g} times the usual size"
        for row in judged
    )
    by_output = rows[-1]
    return Result(
        Verdict.HOLDS if holds else Verdict.DOES_NOT_HOLD,
        f"Mean change of the log-probability of the own token of {judged[0]['neurons']} neurons, against that of "
        f"random neurons with as large an output: {listed}. Decoded by what they write instead (columns of down), it "
        f"is {by_output['own token, nats']:+.3f} against {by_output['random neurons, nats']:+.3f}.",
        rows,
    )


def _row(kind: str, strength: float, effects: Effects) -> dict[str, Any]:
    others = effects.others.nanmean(1)
    difference = effects.own - others
    return {
        "decoded by": kind, "strength": strength, "neurons": len(difference),
        "own token, nats": float(effects.own.mean()), "random neurons, nats": float(others.mean()),
        "difference": float(difference.mean()), "standard error": float(difference.std() / len(difference) ** 0.5),
        "change of the loss, nats": float(effects.loss.mean()),
    }  # fmt: skip
