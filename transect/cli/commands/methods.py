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

# What a user wants to do, by the family that does it; a family that is not here stands under its own name.
PURPOSES = {
    "factorization": "Make it smaller: low rank, matrix by matrix (compress, compare)",
    "replacement": "Make it smaller: another structure, matrix by matrix (compress, compare)",
    "slicing": "Make it smaller: narrower blocks (compress, compare)",
    "restructuring": "Make it smaller: the model as a whole (compress, compare)",
    "sharing": "Share out the bytes that are kept, before the method runs (--allocation)",
    "ranking": "Choose the ranks of low-rank methods by the loss that they cost (--allocation)",
    "probe": "Look inside (inspect)",
    "adapter": "Fine-tune it: what is trained (adapt --method)",
    "parametrization": "Fine-tune it in other numbers, and put it together afterwards (adapt --method)",
    "objective": "Fine-tune it: what is lowered (adapt --objective)",
    "optimizer": "Fine-tune it: how steps are taken (adapt --optimizer)",
    "rates": "Fine-tune it: by what each layer's learning rate is multiplied (adapt --layer-rates)",
    "penalty": "Fine-tune it: what is added to the loss (adapt --penalties)",
    "mixer": "Stand in the place of attention (build --mixer)",
    "mlp": "Stand in the place of the MLP (build --mlp)",
    "activation": "Stand in the place of the MLP's activation (build --activation)",
    "matrix": "Stand in the places of matrices, and are none (build --matrix)",
    "norm": "Stand in the places of the norms (build --norm)",
    "block": "Stand around whole blocks (build --block)",
    "search": "Choose its sizes inside it, and cut the smaller model out (search --method)",
    "conversion": "Turn it into another architecture that keeps its weights (convert)",
    "edit": "Change what it knows or does (edit)",
}


def _print_by_purpose(entries: Sequence[Any]) -> None:
    """A line an entry, whole where the output is not a terminal; a narrow terminal gets more lines, indented."""
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
    """List the methods, allocations, probes, conversions, edits, parts, ways to adapt or search; or one of them."""
    from ...adaptation import adapters
    from ...compression import allocations, method
    from ...compression import methods as all_methods
    from ...conversion import conversions
    from ...editing import edits
    from ...goals import objectives
    from ...parts import parts
    from ...probes import probes
    from ...sizing import searchers
    from ...training import layer_rates, optimizers, parametrizations, penalties

    ways = (*adapters(), *parametrizations(), *objectives(), *optimizers(), *layer_rates(), *penalties(), *searchers())
    entries = [*all_methods(), *allocations(), *probes(), *conversions(), *edits(), *ways, *parts()]
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
