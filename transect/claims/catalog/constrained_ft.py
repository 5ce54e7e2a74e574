"""Claims of constrained fine-tuning on facts (Zhu et al., arXiv:2012.00363, with the settings of arXiv:2301.04213)."""

from __future__ import annotations

from ...editing.catalog.constrained_ft import bound
from ...editing.places import down_of, usual_layer
from ..context import Context
from ..fact_editing import ENOUGH, SINGLE, Bench, erases_and_amplifies, row
from ..registry import Result, Verdict, claim

_PAPER = "arXiv:2012.00363"
_TIMES = (1.0, 2.0, 4.0, 8.0)


@claim(
    "constrained-ft/bound",
    method="constrained-ft",
    paper=_PAPER,
    statement="With a bound on every weight's change, fine-tuning still makes the model itself write at least 95 % of "
    "new answers, and changes the answers about other subjects less than without a bound.",
)
def bounded(context: Context) -> Result:
    """Single facts in one layer: the default bound and steps, larger bounds with 200 steps, and no bound."""
    bench = Bench.of(context, SINGLE)
    layer = usual_layer(bench.specimen)
    usual = bound("injection", 1, down_of(bench.specimen, layer).shape[1])
    tried = {"default": {}} | {f"ε x {n:g}, 200 steps": {"epsilon": n * usual, "steps": 200} for n in _TIMES}
    rows = [row(label, bench.one_by_one("constrained-ft", bench.facts, **given)) for label, given in tried.items()]
    free = row("no bound, 200 steps", bench.one_by_one("constrained-ft", bench.facts, epsilon=1e9, steps=200))
    ours = rows[0]
    better = [one["edit"] for one in rows if one["new generated"] >= ENOUGH]
    holds = ours["edit"] in better and ours["neighbourhood score"] > free["neighbourhood score"]
    told = (
        f"With the default ε = {usual:.2e} the model itself writes the new answer of {ours['new generated']:.1%} of "
        f"{len(bench.facts)} facts, with a neighbourhood score of {ours['neighbourhood score']:.4f} (1: untouched); "
        f"without a bound of {free['new generated']:.1%}, with {free['neighbourhood score']:.4f}. At least 95 % are "
        f"reached with: {', '.join(better) or 'none of the bounds tried'}."
    )
    return Result(Verdict.of(holds), told, [*rows, free])


@claim(
    "constrained-ft/erases-and-amplifies",
    method="constrained-ft",
    paper="arXiv:2301.04213",
    statement="Constrained fine-tuning makes a true answer less probable when it is to erase it, and more when it "
    "is to amplify it.",
)
def both_ways(context: Context) -> Result:
    """With the default bounds of the two problems."""
    return erases_and_amplifies(context, "constrained-ft")
