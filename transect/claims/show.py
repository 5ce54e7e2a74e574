"""Outcomes for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .registry import Verdict
from .run import Outcome

_STYLE = {Verdict.HOLDS: "green", Verdict.DOES_NOT_HOLD: "bold red", Verdict.NOT_APPLICABLE: "dim"}


def rich_outcome(outcome: Outcome) -> Group:
    """The claim's sentence, its paper, the numbers, and the verdict with its reason."""
    claim, result = outcome.claim, outcome.result
    parts: list[Any] = [
        Text.assemble((claim.name, "bold"), f"  [{claim.paper}]"),
        Text(claim.statement, style="italic"),
    ]
    if result.numbers:
        parts.append(_grid(result.numbers))
    parts.append(Text.assemble((str(result.verdict), _STYLE[result.verdict]), f": {result.explanation}\n"))
    return Group(*parts)


def _grid(numbers: list[dict[str, Any]]) -> Table:
    """Narrow enough for 80 columns: a heading is a word a line, texts wrap, and numbers are never cut."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name, first in numbers[0].items():
        text = isinstance(first, str)
        grid.add_column(name.replace("_", "\n"), justify="left" if text else "right", no_wrap=not text)
    for row in numbers:
        grid.add_row(*map(_cell, row.values()))
    return grid


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.5g}"
    return str(value)
