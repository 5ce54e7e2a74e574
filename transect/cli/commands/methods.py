"""`transect methods`: what there is to choose from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from ..group import main_group
from ..options import shared_options
from ..printing import print_whole, stdout


def _print_by_purpose(entries: Sequence[Any]) -> None:
    """A line an entry, whole where the output is not a terminal; a narrow terminal gets more lines, indented."""
    from ...pages import PURPOSES

    groups: dict[str, list[Any]] = {purpose: [] for purpose in PURPOSES.values()}
    for entry in entries:
        groups.setdefault(PURPOSES.get(entry.family) or entry.family, []).append(entry)
    left = max(len(entry.name) for entry in entries) + 4
    right = max(stdout.width - left, 30) if stdout.is_terminal else None
    for purpose, members in groups.items():
        if not members:
            continue
        print_whole(purpose)
        for entry in members:
            said = f"{entry.summary} [{entry.paper}]"
            first, *rest = [said] if right is None else textwrap.wrap(said, right)
            print_whole("\n".join([f"  {entry.name}".ljust(left) + first, *(" " * left + more for more in rest)]))
        print_whole("")


@main_group.command()
@click.argument("name", required=False)
@shared_options("json")
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, allocations, probes, conversions, edits, parts, ways to adapt, merge or search; or one."""
    from ...compression import method
    from ...pages import entries as all_entries

    entries = all_entries()
    if name is not None:  # `method` says which names there are
        entries = [entry for entry in entries if entry.name == name] or [method(name)]
    if as_json:
        described = [
            {
                "name": entry.name, "family": entry.family, "paper": entry.paper, "summary": entry.summary,
                "needs": getattr(entry, "wants", None), "allocation": _allocation_of(entry),
                "note": getattr(entry, "note", ""),
                "parameters": [
                    {"name": p.name, "default": p.default, "type": p.kind.__name__, "choices": p.choices,
                     "range": p.range and [p.range.low, p.range.high], "help": p.help}
                    for p in entry.parameters
                ],
            }
            for entry in entries
        ]  # fmt: skip
        click.echo(json.dumps(described, indent=2))
        return
    if name is None:
        _print_by_purpose(entries)
        return
    for entry in entries:  # a method of more than one kind is one of each
        _print_one(entry)


def _print_one(entry: Any) -> None:
    """What it is, what it needs, its docstring, and a table of its parameters."""
    import inspect

    print_whole(f"{entry.name} ({entry.family}), {entry.paper}")
    if hasattr(entry, "wants"):  # of probes and edits the docstring says it
        print_whole(f"needs: {', '.join(entry.wants) or 'no data'}")
    if _allocation_of(entry) is not None:
        print_whole(f"allocation, unless you name another: {entry.allocation}")
    if note := getattr(entry, "note", ""):
        print_whole(f"note: {note}")
    print_whole("")
    print_whole(inspect.getdoc(entry.function) or "")
    if exact := getattr(entry, "exact", ""):  # of a conversion
        print_whole(f"\nbefore any training: {exact}")
    if limit := getattr(entry.function, "limit", ""):  # of a part
        print_whole(f"\nwhen it is the standard part: {limit}")
    grid = Table("parameter", "type", "default", "accepts")
    for p in entry.parameters:
        accepts = (
            ", ".join(map(str, p.choices)) if p.choices else f"{p.range.low:g} to {p.range.high:g}" if p.range else ""
        )
        grid.add_row(p.name, p.kind.__name__, str(p.default), accepts)
    if entry.parameters:
        stdout.print(grid)


def _allocation_of(entry: Any) -> str | None:
    """How a method's budget is shared out by default; None for what takes no allocation."""
    return entry.allocation if getattr(entry, "family", None) in ("factorization", "replacement", "slicing") else None
