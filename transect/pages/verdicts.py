"""The recorded verdicts as one document of tables: `python -m transect.pages.verdicts docs/claims.md`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..claims import Verdict
from ..claims.records import Record, records_in
from ..store import write_text

COUNTED = {Verdict.HOLDS: "hold", Verdict.DOES_NOT_HOLD: "do not hold", Verdict.NOT_APPLICABLE: "not applicable"}
HEAD = """# What the papers claim, and what was measured

Made from the verdicts that come with the package (`transect/claims/recorded`) by `python -m transect.pages.verdicts
docs/claims.md`; nothing here is typed by hand. `transect claims NAME --model MODEL` measures them on your model, and
`transect catalogue --out site/` shows the numbers behind each.
"""


def verdicts_document(records: Sequence[Record]) -> str:
    """Markdown: how many claims hold on each model, and a table a model with what was seen of each claim."""
    models = {
        model: [one for one in records if one.model == model] for model in dict.fromkeys(r.model for r in records)
    }
    lines = [HEAD]
    for model, found in models.items():
        counts = [(sum(one.verdict == verdict for one in found), word) for verdict, word in COUNTED.items()]
        counted = ", ".join(f"{count} {word}" for count, word in counts if count)
        lines += [f"## `{model}`: {counted}", "", "| claim | verdict | seen |", "| :--- | :--- | :--- |"]
        for one in sorted(found, key=lambda record: record.claim):
            said = f"{one.statement} ({one.paper})"
            lines.append(f"| `{one.claim}`: {_cell(said)} | {one.verdict} | {_cell(one.explanation)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The text on one line, and no end of a column in it."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), verdicts_document(records_in()))
