"""Outcomes of claims as the terminal shows them."""

from __future__ import annotations

import pytest
from rich.console import Console

from transect.claims import Outcome, Result, Verdict, claims
from transect.claims.show import rich_outcome

NUMBERS = [
    {"layer": 0, "best before training": 1.5, **{f"perplexity_at_{k}": 12345.0 for k in range(7)}, "why": "unforeseen"},
    {"layer": 1, "best before training": 0.51235, **{f"perplexity_at_{k}": 0.00123 for k in range(8)}, "held": True},
]


@pytest.mark.parametrize("width", [30, 80, 300])
def test_no_number_and_no_heading_is_cut_however_narrow_it_is(width):
    outcome = Outcome(claims()[0], Result(Verdict.HOLDS, "It does.", NUMBERS))
    console = Console(width=width)
    with console.capture() as captured:
        console.print(rich_outcome(outcome), crop=False)
    shown = captured.get()
    assert "…" not in shown
    for word in ("0.51235", "12345", "0.00123", "yes", "before", "training", "perplexity", "unforeseen", "held"):
        assert word in shown.split()
