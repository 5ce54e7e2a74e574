"""Outcomes for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .registry import Verdict
from .run import Outcome

_STYLE = {
    Verdict.HOLDS: "green",
    Verdict.DOES_NOT_HOLD: "bold red",
    Verdict.NOT_APPLICABLE: "dim",
    Verdict.FAILED: "bold red",
}


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
    """As narrow as can be: a heading is a word a line, texts wrap. Print with crop=False: no number is ever cut."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    columns = list(dict.fromkeys(name for row in numbers for name in row))
    for name in columns:
        values = [row.get(name, "") for row in numbers]
        words, text = name.replace("_", " ").split(), any(value and isinstance(value, str) for value in values)
        longest = max(len(word) for cell in map(_cell, values) for word in [*words, *cell.split()])
        grid.add_column("\n".join(words), justify="left" if text else "right", min_width=longest)
    for row in numbers:
        grid.add_row(*(_cell(row.get(name, "")) for name in columns))
    return grid


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.5g}"
    return str(value)
