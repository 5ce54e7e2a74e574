"""The recorded verdicts as a document of tables, and as one table by purpose in another text.

`python -m transect.pages.verdicts docs/claims.md README.md` makes both anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..claims import Verdict
from ..claims.records import Record, records_in
from ..errors import TransectError
from ..store import write_text
from .entries import PURPOSES, entries

BEGIN, END = "<!-- verdicts -->", "<!-- end of verdicts -->"
BUNDLED = "organism"
OTHER = "Know what is behind it"  # claims of papers whose method is a command, or none
COUNTED = {Verdict.HOLDS: "hold", Verdict.DOES_NOT_HOLD: "do not hold", Verdict.NOT_APPLICABLE: "not applicable"}
HEAD = """# What the papers claim, and what was measured

Made from the verdicts that come with the package (`transect/claims/recorded`) by `python -m transect.pages.verdicts
docs/claims.md README.md`; nothing here is typed by hand. `transect claims NAME --model MODEL` measures them on your
model, and `transect catalogue --out site/` shows the numbers behind each.
"""


def verdicts_document(records: Sequence[Record]) -> str:
    """Markdown: how many claims hold on each model, and a table a method: each claim, and what was seen on each model.

    The bundled model comes first.
    """
    models = sorted({record.model for record in records}, key=lambda model: (model != BUNDLED, model))
    lines = [HEAD, f"| on | {' | '.join(COUNTED.values())} |", "| :--- |" + " ---: |" * len(COUNTED)]
    for model in models:
        counts = [sum(one.model == model and one.verdict == verdict for one in records) for verdict in COUNTED]
        lines.append(f"| `{model}` | {' | '.join(map(str, counts))} |")
    by_method: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.claim):
        by_method.setdefault(record.method, []).append(record)
    for method, found in sorted(by_method.items()):
        lines += ["", f"## {method}", "", *_table(found, [m for m in models if any(m == r.model for r in found)])]
    return "\n".join([*lines, ""])


def _table(records: Sequence[Record], models: Sequence[str]) -> list[str]:
    """A row a claim: what it says, and in a column a model the verdict with what was seen."""
    seen: dict[str, dict[str, Record]] = {}
    for record in records:
        seen.setdefault(record.claim, {})[record.model] = record
    heading = " | ".join(f"on `{model}`" for model in models)
    lines = [f"| claim | {heading} |", "| :--- |" + " :--- |" * len(models)]
    for claim, found in seen.items():
        one = next(iter(found.values()))
        cells = [
            f"**{found[model].verdict}**: {found[model].explanation}" if model in found else "-" for model in models
        ]
        said = f"`{claim}`: {one.statement} ({one.paper})"
        lines.append(f"| {' | '.join(map(_cell, [said, *cells]))} |")
    return lines


def table_by_purpose(records: Sequence[Record]) -> str:
    """Markdown: for what a user wants to do, how many claims hold on each model, of how many, in all and by method.

    The bundled model comes first. Behind the table, of each other model, which claims hold on one of the two alone.
    """
    family = {entry.name: entry.family for entry in reversed(entries())}  # a conversion before the part of its name
    verdicts: dict[str, dict[str, bool]] = {BUNDLED: {}}  # by model, of each claim whether it holds
    for record in sorted(records, key=lambda record: record.claim):
        if record.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD):
            verdicts.setdefault(record.model, {})[record.claim] = record.verdict == Verdict.HOLDS
    methods: dict[str, dict[str, None]] = {purpose: {} for purpose in (*dict.fromkeys(PURPOSES.values()), OTHER)}
    for record in sorted(records, key=lambda record: record.claim):
        if any(record.claim in found for found in verdicts.values()):
            methods[PURPOSES.get(family.get(record.method, ""), OTHER)][record.method] = None
    headings = ["claims that hold", *(f"on `{model}`" for model in verdicts if model != BUNDLED)]
    lines = [f"| to | {' | '.join(headings)} | of each |", "| :--- |" + " :--- |" * (len(headings) + 1)]
    for purpose, names in methods.items():
        if names:
            counts = [_counted(found, names) or "-" for found in verdicts.values()]
            each = [f"`{name}` {_by_model(verdicts, name)}" for name in names]
            lines.append(f"| {purpose} | {' | '.join(counts)} | {', '.join(each)} |")
    return "\n".join([*lines, *_differences(verdicts)])


def _counted(verdicts: Mapping[str, bool], methods: Iterable[str]) -> str:
    """How many of these methods' claims hold, of how many."""
    found = [held for claim, held in verdicts.items() if claim.partition("/")[0] in methods]
    return f"{sum(found)} of {len(found)}" if found else ""


def _by_model(verdicts: Mapping[str, Mapping[str, bool]], method: str) -> str:
    """How many of its claims hold on each model, up to the last one where any was measured."""
    counts = [_counted(found, [method]) or "-" for found in verdicts.values()]
    while counts[-1] == "-":
        counts.pop()
    return " and ".join(counts)


def _differences(verdicts: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """Which claims hold on the bundled model and not on another, and the other way round."""
    lines, own = [], verdicts[BUNDLED]
    for model, found in verdicts.items():
        for one, other, first, second in ((BUNDLED, model, own, found), (model, BUNDLED, found, own)):
            alone = [f"`{claim}`" for claim, held in first.items() if held and second.get(claim) is False]
            if alone:
                lines += ["", f"Hold on `{one}` and not on `{other}`: {', '.join(alone)}."]
    return lines


def with_table(text: str, records: Sequence[Record]) -> str:
    """The text with that table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise TransectError(f"the table of verdicts goes between {BEGIN!r} and {END!r}, which are not there")
    return f"{before}{begin}\n{table_by_purpose(records)}\n{end}{after}"


def _cell(text: str) -> str:
    """The text on one line, and no end of a column in it."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    shipped, table = records_in(), Path(sys.argv[2])
    write_text(Path(sys.argv[1]), verdicts_document(shipped))
    write_text(table, with_table(table.read_text(encoding="utf-8"), shipped))
