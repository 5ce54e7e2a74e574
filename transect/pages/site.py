"""The catalogue as a static site: an index by purpose with a search, and a page for every entry, without network."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape

from .. import pages, report
from ..claims import claims
from ..claims.records import Record
from ..report.number import in_a_cell
from ..store import Folder, write_text
from ..version import __version__
from .entries import COMMANDS, PURPOSES, entries

KIND = "a catalogue"  # what the folder of one is
INDEX = "index.html"


def write_site(folder: Folder, records: Sequence[Record]) -> list[str]:
    """Write the pages into the folder; returns their names. records: measured verdicts, the newest of each is shown."""
    environment = Environment(loader=PackageLoader("transect.pages"), autoescape=select_autoescape())
    environment.filters["marked"] = _marked
    pages = [_page(one, records) for one in entries()]
    by_purpose = {purpose: [page for page in pages if page["purpose"] == purpose] for purpose in PURPOSES.values()}
    groups = {purpose: members for purpose, members in by_purpose.items() if members}
    searched = [{"file": p["file"], "words": f"{p['name']} {p['paper']} {p['summary']}".lower()} for p in pages]
    common = {
        "version": __version__,
        "style": Markup(_source("base.css", of=report) + _source("style.css")),
        "script": Markup(_source("site.js")),
    }
    written = [page["file"] for page in pages]
    folder.add(INDEX, *written)  # at once, which is one write of the mark and not one a page
    for page in pages:
        neighbours = [one for one in groups[page["purpose"]] if one is not page]
        page_ = environment.get_template("page.html").render(page=page, neighbours=neighbours, **common)
        write_text(folder.file(page["file"]), page_)
    index = environment.get_template("index.html").render(
        groups=groups, count=len(pages), searched=Markup(json.dumps(searched).replace("<", "\\u003c")), **common
    )
    write_text(folder.file(INDEX), index)
    return [INDEX, *written]


def _marked(text: str) -> Markup:
    """The text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _source(name: str, of: Any = pages) -> str:
    return (files(of) / "templates" / name).read_text(encoding="utf-8")


def _page(entry: Any, records: Sequence[Record]) -> dict[str, Any]:
    """What the page of an entry shows."""
    said, parameters = inspect.getdoc(entry.function) or "", entry.parameters
    settings = tuple(f"{parameter.name}: " for parameter in parameters)
    lines = [line for line in said.split("\n") if not line.startswith(settings)]
    paragraphs = [" ".join(part.split()) for part in "\n".join(_without_continued(lines)).split("\n\n")]
    claimed = [one for one in claims() if one.method == entry.name]
    return {
        "name": entry.name, "family": entry.family, "file": f"{entry.family}-{entry.name}.html",
        "purpose": PURPOSES.get(entry.family, entry.family), "summary": entry.summary,
        "paragraphs": [one for one in paragraphs[1:] if one],
        "paper": entry.paper, "link": _link(entry.paper),
        "needs": ", ".join(getattr(entry, "wants", ())) or "",
        "notes": [note for note in (
            getattr(entry, "note", ""),
            f"Before any training: {entry.exact}." if getattr(entry, "exact", "") else "",
            f"When it is the standard part: {entry.function.limit}." if getattr(entry.function, "limit", "") else "",
            f"Cost in the number of positions: {entry.function.cost}." if getattr(entry.function, "cost", "") else "",
        ) if note],
        "parameters": [
            {"name": p.name, "type": p.kind.__name__, "default": str(p.default), "accepts": _accepts(p), "help": p.help}
            for p in parameters
        ],
        "command": COMMANDS.get(entry.family, "").replace("NAME", entry.name),
        "claims": [
            {"name": one.name, "statement": one.statement, "records": _newest(one.name, records)} for one in claimed
        ],
    }  # fmt: skip


def _without_continued(lines: list[str]) -> list[str]:
    """The lines that are not indented: those go on with the text of a setting."""
    return [line for line in lines if not line.startswith("    ")]


def _accepts(parameter: Any) -> str:
    if parameter.choices:
        return ", ".join(map(str, parameter.choices))
    return str(parameter.range) if parameter.range else ""


def _link(paper: str) -> str:
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", paper)
    return f"https://arxiv.org/abs/{found[1]}" if found else ""


def _newest(claim: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The newest record of each model, with its numbers as a table."""
    newest: dict[str, Record] = {}
    for record in records:
        if record.claim == claim and (record.model not in newest or record.date > newest[record.model].date):
            newest[record.model] = record
    return [
        {
            "model": record.model, "verdict": record.verdict, "explanation": record.explanation,
            "date": record.date[:10], "version": record.version, "machine": record.machine,
            "columns": (columns := list(dict.fromkeys(key for row in record.numbers for key in row))),
            "rows": [[in_a_cell(row.get(column, "")) for column in columns] for row in record.numbers],
        }
        for record in newest.values()
    ]  # fmt: skip
