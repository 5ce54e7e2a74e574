"""Claims of channels between heads (Merullo et al. 2024, arXiv:2406.09519)."""

from __future__ import annotations

from ...probes.catalog.talking_heads.channels import READS
from ..context import Context
from ..copying import copying_heads, heads_that
from ..probing import probed_once
from ..registry import NotApplicable, Result, Verdict, claim

_PAPER = "arXiv:2406.09519"


@claim(
    "talking-heads/outliers",
    method="talking-heads",
    paper=_PAPER,
    statement="Heads talk over single directions: the best component of a channel stands out of its writer's others "
    "and above whole heads.",
)
def outliers(context: Context) -> Result:
    """The strongest channels against the whole heads' scores, in multiples of what random matrices give."""
    found = probed_once(context, "talking-heads", tested=0)
    scale = float(found["width"]) ** 0.5
    rows = [
        {"channel": label, "x random": float(score) * scale, "standard deviations": float(far)}
        for label, score, far in zip(found.labels["channel"], found["channels"], found["outliers"], strict=True)
    ]
    heads = float(found["heads"].max()) * scale
    holds = rows[0]["x random"] > heads and rows[0]["standard deviations"] > 3
    return Result(
        Verdict.of(holds),
        f"The best component scores {rows[0]['x random']:.1f} times random and is {rows[0]['standard deviations']:.1f} "
        f"standard deviations above its writer's mean; the best whole head scores {heads:.1f} times. Three standard "
        "deviations are our threshold.",
        rows,
    )


@claim(
    "talking-heads/removal",
    method="talking-heads",
    paper=_PAPER,
    statement="Removing the component of a strong channel hurts copying more than removing another component of the "
    "same head.",
)
def removal(context: Context) -> Result:
    """The five strongest channels, on random tokens that are said twice."""
    found = probed_once(context, "talking-heads", tested=5)
    if "removed" not in found.quantities:
        raise NotApplicable("the model predicts no next token")
    removed, control = found["removed"], found["control"]
    rows = [
        {"channel": label, "removed, nats": float(one), "other components, nats": float(other)}
        for label, one, other in zip(found.labels["channel"], removed, control, strict=False)
    ]
    more = int((removed > control).sum())
    return Result(
        Verdict.of(more == len(rows)),
        f"The loss rises by {float(removed.mean()):.4f} nats without a channel's component and by "
        f"{float(control.mean()):.4f} without another; more in {more} of {len(rows)} channels.",
        rows,
    )


@claim(
    "talking-heads/induction",
    method="talking-heads",
    paper=_PAPER,
    statement="Where a model copies what was said before, no two heads compose more strongly by their keys than one "
    "that looks one token back and one that copies.",
)
def induction(context: Context) -> Result:
    """The place of that pair among all pairs of heads by the key's composition score; it should be the first.

    The heads are found by what they attend to on random tokens that are said twice, see `copying`.
    """
    specimen = context.specimen
    specimen.require_causal()
    back, copies = copying_heads(specimen)
    known = [
        (early, late)
        for early in heads_that(back, "looks one token back")
        for late in heads_that(copies, "attends to what came behind a token's earlier occurrence")
        if early[0] < late[0]
    ]
    if not known:
        raise NotApplicable("no head that looks one token back is in an earlier layer than one that copies")
    found = probed_once(context, "talking-heads", tested=0)
    scores, names = found["heads"][READS.index("key")], list(found.labels["head"])
    places = [tuple(names.index(f"{layer}.{head}") for layer, head in pair) for pair in known]
    order = scores.flatten().argsort(descending=True).argsort().view_as(scores)
    rows = [
        {"pair": f"{names[a]} -> {names[b]}", "place": 1 + int(order[a, b]), "score": float(scores[a, b])}
        for a, b in places
    ]
    best = min(rows, key=lambda row: row["place"])
    return Result(
        Verdict.of(best["place"] == 1),
        f"{best['pair']} is at place {best['place']} of {int((scores > 0).sum())} pairs of heads.",
        rows,
    )
