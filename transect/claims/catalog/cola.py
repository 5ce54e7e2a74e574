"""Claims of Chain-of-Layers (Li et al. 2025, arXiv:2507.07996), each with the control that its paper leaves out."""

from __future__ import annotations

from math import isnan
from typing import Any

from ...errors import NotApplicable
from ...probes import Result as Found
from ...probes.catalog.cola.cola_findings import shares_of
from ..context import Context
from ..probing import probed
from ..registry import Result, Verdict, claim

_PAPER = "arXiv:2507.07996"
SETTINGS: dict[str, Any] = {"inputs": 24, "simulations": 100}
LEAST = 2  # questions that a share is of


@claim(
    "cola/shorter",
    method="cola",
    paper=_PAPER,
    statement="More than 75 % of the inputs that a model answers rightly have a right path of fewer layers, and a tree "
    "search finds more of them than as many random paths do.",
)
def shorter(context: Context) -> Result:
    """On facts where there are any, and on choices otherwise; the second half of the sentence is ours."""
    found = probed(context.specimen, "cola", **SETTINGS)
    one = shares_of({name: one.values for name, one in found.quantities.items()}, 0)
    if one.right < LEAST:
        raise NotApplicable(f"the model answers {one.right} of the questions rightly, and {LEAST} are needed")
    return Result(
        Verdict.of(one.shorter > 0.75 and one.shorter > one.shorter_by_random),
        f"Of {one.right} questions answered rightly, {one.shorter:.0%} have a right path of fewer layers (mean length "
        f"of the shortest {one.lengths[0]:.2f} of {context.specimen.layers}), and {one.shorter_by_random:.0%} by as "
        "many random paths.",
        _rows(found, right=True),
    )


@claim(
    "cola/corrected",
    method="cola",
    paper=_PAPER,
    statement="More than 60 % of the inputs that a model answers wrongly have some right path, and a tree search finds "
    "more of them than as many random paths, or guesses, do.",
)
def corrected(context: Context) -> Result:
    """On choices where there are any, and on facts otherwise; the second half of the sentence is ours."""
    kind = "choices" if context.specimen.known_choices else "facts"
    found = probed(context.specimen, "cola", kind=kind, **SETTINGS)
    one = shares_of({name: one.values for name, one in found.quantities.items()}, 0)
    if one.wrong < LEAST:
        raise NotApplicable(f"the model answers {one.wrong} of the questions wrongly, and {LEAST} are needed")
    guessed = 0.0 if isnan(one.corrected_by_chance) else one.corrected_by_chance  # one answer leaves nothing to guess
    beaten = one.corrected > max(guessed, one.corrected_by_random)
    return Result(
        Verdict.of(one.corrected > 0.6 and beaten),
        f"Of {one.wrong} questions ({kind}) answered wrongly, {one.corrected:.0%} have some right path, "
        f"{one.corrected_by_random:.0%} by as many random paths, and {one.corrected_by_chance:.0%} would be hit by as "
        "many different guesses.",
        _rows(found, right=False),
    )


def _rows(found: Found, right: bool) -> list[dict[str, Any]]:
    columns = {name: found[name][0].tolist() for name in ("searched", "random", "answers", "chance")}
    plain = found["plain"].tolist()
    return [
        {"question": found.labels["question"][number], "path": found.labels["program"][number]}
        | {name: (None if column[number] != column[number] else column[number]) for name, column in columns.items()}
        for number in range(len(plain))
        if bool(plain[number]) == right
    ]
