"""Short texts, each of one kind: code, sums, prose. What serves a kind is asked of them."""

from __future__ import annotations

import ast
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from ....data.containers import items_of
from ....data.questions import text_in
from ....data.sources import json_entries, rows_of
from ....errors import BadData

EACH = 200  # texts of each kind of the built-in sets
MODULES = (
    "argparse", "ast", "calendar", "csv", "difflib", "fractions", "inspect", "json.decoder", "pathlib", "statistics",
    "string", "tarfile", "textwrap", "threading", "typing", "unittest.case", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """A text, and the kind that it is of (the function that it asks for): it belongs to no other."""

    text: str
    function: str


def load_functions(data: str | Path | Sequence[Any]) -> list[Instance]:
    """Texts with their kinds: a JSON file (a list) or JSON lines, a built-in set, or a list of `Instance`s or dicts.

    A dict has `text` and `label`, the name of its kind. Built in are `organism`, the kinds of documents of the bundled
    model's world, and `python`, what every machine has for a model of real text: documentation and source code of
    Python's own library, sums, and names of characters.
    Raises BadData, naming the entry, and where there are fewer than two kinds.
    """
    if data == "organism":
        return list(_of_organism())
    if data == "python":
        return list(_of_python())
    if isinstance(data, (str, Path)):
        entries = json_entries(Path(data), "the labelled texts")
    else:
        entries = items_of(data, "the labelled texts")
    made = []
    for number, entry in enumerate(entries):
        try:
            made.append(entry if isinstance(entry, Instance) else _instance(entry))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise BadData(f"entry {number} of the labelled texts cannot be used: {reason}") from None
    kinds = {one.function for one in made}
    if len(kinds) < 2:
        told = f"all are {next(iter(kinds))!r}" if kinds else "there are none"
        raise BadData(f"labelled texts of two kinds at least are needed to tell them apart, and {told}")
    return made


def _instance(entry: Any) -> Instance:
    if not isinstance(entry, Mapping):
        raise TypeError(f"a dict is expected, not a {type(entry).__name__}")
    text, label = text_in(entry, "text"), entry["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
        raise ValueError(f"its label should be a name or a number, not {label!r}")
    if not text.strip():
        raise ValueError("its text is empty")
    return Instance(text, str(label))


def _of_organism() -> Iterator[Instance]:
    """Different documents of each kind, as many as are found, at most 200."""
    from ....organism import World
    from ....organism.documents import MIX

    world, rng = World(), Random("functions")
    for kind in MIX:
        found: dict[str, None] = {}
        for _ in range(4 * EACH):
            found[" ".join(example.text for example in kind(world, rng))] = None
            if len(found) == EACH:
                break
        yield from (Instance(text, kind.__name__) for text in found)


def _of_python() -> Iterator[Instance]:
    rng = Random("functions")
    paragraphs = (part for row in rows_of("pydoc:calibration", 0) for part in row["text"].split("\n\n"))
    prose = [" ".join(part.split()) for part in paragraphs if len(part) > 200 and not part.startswith(("   ", "|"))]
    code = [textwrap.dedent(source).strip() for source in _sources()]
    sums = [" ".join(_sum(rng) for _ in range(8)) for _ in range(EACH)]
    letters = [name for number in range(0x4000) if (name := unicodedata.name(chr(number), ""))]
    names = ["; ".join(rng.sample(letters, 8)) for _ in range(EACH)]
    for kind, texts in (("documentation", prose), ("code", code), ("sums", sums), ("character names", names)):
        different = list(dict.fromkeys(texts))
        yield from (Instance(text, kind) for text in sorted(rng.sample(different, min(EACH, len(different)))))


def _sum(rng: Random) -> str:
    a, b = rng.randrange(10, 1000), rng.randrange(10, 1000)
    return f"{a} + {b} = {a + b}."


def _sources() -> Iterator[str]:
    """Source code of functions that is mostly code, and little prose."""
    for name in MODULES:
        found = find_spec(name)
        if found is None or not found.has_location or found.origin is None or not found.origin.endswith(".py"):
            continue  # an installation without the sources
        text = Path(found.origin).read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if len(source) > 200 and len(ast.get_docstring(node) or "") < len(source) / 4:
                    yield source
