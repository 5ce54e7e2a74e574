"""Claims of the lazy neuron study (Li et al. 2023, arXiv:2210.06313) about the model at hand."""

from __future__ import annotations

from ...context import Context
from ...probing import probed, probed_once, untrained
from ...registry import NotApplicable, Result, Verdict, claim

PAPER = "arXiv:2210.06313"
HEALTHY = 0.05


@claim(
    "lazy-neuron/training",
    method="lazy-neuron",
    paper=PAPER,
    statement="In a trained model fewer than half of the MLP neurons are active for a token, in every layer, and "
    "fewer than in the same model before training.",
)
def training(context: Context) -> Result:
    """Against a model of the same configuration with random weights, on the same text.

    The paper is about ReLU and counts exact zeros. For other activation functions a neuron counts as active where
    it exceeds 5 % of the token's largest. That is an extension, and it depends on the 5 %. So there the claim holds
    only where another extension agrees: the fewest neurons with 95 % of the sum of sizes are fewer than before
    training too.
    """
    trained = probed_once(context, "lazy-neuron", sequences=1)
    fresh = probed(untrained(context.specimen), "lazy-neuron", sequences=1)
    layers = trained.labels["layer"]
    if list(layers) != list(fresh.labels["layer"]):
        raise NotApplicable("MLPs of this model were dropped: it has no untrained counterpart")
    sharp = bool(trained["sharp"])
    measure = 0 if sharp else 1
    after, before = trained["density"][measure], fresh["density"][measure]
    rows = [
        {
            "layer": int(name),
            "active": float(after[number]),
            "active before training": float(before[number]),
            "95 % of the sum": float(trained["density"][2, number]),
            "95 % of the sum before training": float(fresh["density"][2, number]),
        }
        for number, name in enumerate(layers)
    ]
    holds = bool(((after < 0.5) & (after < before)).all())
    mass, mass_before = trained["density"][2], fresh["density"][2]
    holds &= sharp or bool((mass < mass_before).all())
    denser = [row["layer"] for row in rows if row["95 % of the sum"] >= row["95 % of the sum before training"]]
    return Result(
        Verdict.of(holds),
        f"Active (here: {'not zero' if sharp else 'above 5 % of the largest, an extension to smooth activations'}) "
        f"are {float(after.mean()):.1%} of the neurons, at most {float(after.max()):.1%} in a layer; with random "
        f"weights {float(before.mean()):.1%}. 95 % of the sum of sizes is held by {float(mass.mean()):.1%}, with "
        f"random weights by {float(mass_before.mean()):.1%}"
        + (f"; not fewer in layer {', '.join(map(str, denser))}." if denser else "."),
        rows,
    )


@claim(
    "lazy-neuron/alive",
    method="lazy-neuron",
    paper=PAPER,
    statement="Hardly any MLP neuron is dead: fewer than 5% never fire on a large text, while half of them "
    "fire rarely.",
)
def alive(context: Context) -> Result:
    """Neurons that are never active, in every layer. "Hardly any" is read as 5 %, "rarely" as under half of the
    tokens.

    What counts as active is as in `lazy-neuron/training`.
    """
    found = probed_once(context, "lazy-neuron", sequences=1)
    rates = [row[row.isfinite()] for row in found["rate"]]
    rows = [
        {
            "layer": int(name),
            "never active": float(found["dead"][number]),
            "median share of tokens": float(rates[number].median()),
            "busiest": float(rates[number].max()),
        }
        for number, name in enumerate(found.labels["layer"])
    ]
    worst, median = max(row["never active"] for row in rows), max(row["median share of tokens"] for row in rows)
    return Result(
        Verdict.of(worst < HEALTHY and median < 0.5),
        f"At most {worst:.1%} of a layer's neurons were never active on {context.calibration.tokens} tokens, and "
        f"half of a layer's neurons are active for at most {median:.1%} of them "
        + ("(not zero)." if found["sharp"] else "(above 5 % of the token's largest: an extension to smooth ones)."),
        rows,
    )
