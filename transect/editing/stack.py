"""The edits of a model, one on top of the other: what each was, read and changed, and how any is taken out again.

Beside a checkpoint they lie in a folder of their own: `stack.json` lists them, oldest first, and each has its patch and
its card. Every patch belongs to the weights before and after its edit, by their fingerprints.

The newest edit comes out by a step back, bit for bit. An older one comes out by steps back to the weights before it,
after which the later ones are made again from their patches. So the result is what it would be had it never been made,
if those say the same without it: a later edit that was computed from weights that the older one had changed does not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..anatomy import Anatomy, record_of
from ..compression.fingerprint import model_fingerprint
from ..errors import BadCheckpoint, TransectError
from ..store import keep, keep_json, link, verified, verified_json, write_text
from .card import Card
from .journal import Journal, step_back
from .patch import Patch

logger = logging.getLogger(__name__)
FOLDER, LIST = "transect-edits", "stack.json"
EARLIER = "undo.safetensors"  # of edits before there were stacks
_OF, _ATTRIBUTE = "edits of a model", "_transect_edits"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class Entry:
    """One edit of a stack.

    name: by which it is taken out. made: when, in UTC. facts: texts with what was put in. card: as measured then.
    before, after: fingerprints of the model's weights. reads: names of the parameters that the edit was computed from,
    or None for all. writes: names of those that it changed. patch: itself, or the file that holds it.
    """

    name: str
    made: str
    facts: list[str]
    card: Card
    before: str
    after: str
    reads: list[str] | None
    writes: list[str]
    patch: Patch | Path
    bytes: int = 0

    @property
    def of(self) -> str:
        """What its patch belongs to."""
        return f"{self.name} {self.before} {self.after}"

    def described(self) -> dict[str, Any]:
        """As JSON, without the patch."""
        return {name: value for name, value in asdict(self).items() if name != "patch"}

    def success(self) -> str:
        """The measurement that says whether it worked, before and after; empty where nothing was measured."""
        rows = [row for row in self.card.measured if row[0] == "generated: new answer"] or self.card.measured[:1]
        return "".join(f"{name}: {before:.4g} -> {after:.4g}" for name, before, after in rows)


def checked_name(name: str, stack: Sequence[Entry], method: str) -> str:
    """A name for a new edit: the one that is wanted, or the method's with the first number that is free."""
    taken = {entry.name for entry in stack}
    if not name:
        return next(one for number in range(1, len(stack) + 2) if (one := f"{method}-{number}") not in taken)
    if not _NAME.fullmatch(name):
        raise TransectError(
            f"an edit's name has up to 64 letters, digits, - and _, and begins with none of these: {name!r}"
        )
    if name in taken:
        raise TransectError(f"there is an edit {name!r} in this model already; choose another name")
    return name


def entry_named(stack: Sequence[Entry], name: str) -> Entry:
    """The edit of that name, the newest for an empty one; TransectError that lists what there is."""
    for entry in reversed(stack):
        if name in ("", entry.name):
            return entry
    raise TransectError(f"there is no edit {name!r}; there are {', '.join(entry.name for entry in stack) or 'none'}")


def dependents(stack: Sequence[Entry], name: str) -> list[str]:
    """Names of the later edits that were computed from what this one changed, or from what those changed, in order."""
    names = [entry.name for entry in stack]
    first = names.index(name)
    changed, found = set(stack[first].writes), []
    for entry in stack[first + 1 :]:
        if changed and (entry.reads is None or changed & set(entry.reads)):
            found.append(entry.name)
            changed |= set(entry.writes)
    return found


def take_out(anatomy: Anatomy, stack: Sequence[Entry], name: str, with_dependents: bool) -> list[Entry]:
    """Take an edit out of a model whose weights are as the newest left them; returns the stack without it.

    with_dependents: take out those that depend on it too. Without, TransectError where there are any, which names them.
    BadCheckpoint for a patch that is not what its edit wrote. Nothing is changed in either case but, in memory, steps
    back that were right.
    """
    later = dependents(stack, name)
    if later and not with_dependents:
        raise TransectError(
            f"{', '.join(later)} {'was' if len(later) == 1 else 'were'} computed from weights that {name} had changed, "
            f"so the model without {name} would not be the one that it was never made on; take out "
            f"{'it' if len(later) == 1 else 'them'} too (--dependents, dependents=True), newest first, and make again "
            "what is still wanted"
        )  # fmt: skip
    going, first = {name, *later}, [entry.name for entry in stack].index(name)
    patches: list[Patch] = [patch_of(entry, anatomy) if n >= first else Patch() for n, entry in enumerate(stack)]
    for n in reversed(range(first, len(stack))):
        step_back(anatomy, patches[n])
    if model_fingerprint(anatomy.model) != stack[first].before:
        raise BadCheckpoint(f"the patches do not lead back to the weights before {name}")
    history = record_of(anatomy.model).history
    history[:] = [step for step in history if "edit" not in step or step.get("name") not in going]
    left = list(stack[:first])
    for n in range(first, len(stack)):
        if stack[n].name not in going:
            left.append(_made_again(anatomy, stack[n], patches[n]))
    return left


def _made_again(anatomy: Anatomy, entry: Entry, patch: Patch) -> Entry:
    before, journal = model_fingerprint(anatomy.model), Journal(anatomy.model)
    journal.repeat(patch)
    return Entry(
        entry.name, entry.made, entry.facts, entry.card, before, model_fingerprint(anatomy.model), entry.reads,
        journal.changed(), journal.patch(),
    )  # fmt: skip


def patch_of(entry: Entry, anatomy: Anatomy) -> Patch:
    """The patch, read if it lies in a file; BadCheckpoint unless it is what that edit wrote, and fits the model."""
    if isinstance(entry.patch, Patch):
        return entry.patch
    try:
        stored = verified(entry.patch, entry.of)
        return Patch.read(dict(stored), stored.note, anatomy)
    except BadCheckpoint as error:
        raise BadCheckpoint(
            f"{entry.patch} is not what the edit {entry.name} wrote: {error}; nothing was changed"
        ) from None


def stack_of(model: Any, fingerprint: str) -> list[Entry]:
    """The edits that are in a model: those that were made on it, or that lie beside the checkpoint that it came from.

    fingerprint: of its weights. Edits that left other weights are not of this model as it is, and a note says so.
    """
    found = getattr(model, _ATTRIBUTE, None)
    source = Path(str(getattr(model.config, "name_or_path", "") or "."))
    if found is None:
        if not (source / FOLDER / LIST).is_file():
            return []
        found = read_stack(source)
    if found and found[-1].after != fingerprint:
        logger.info(
            "the edits %s cannot be taken back from here on, since the weights are not those that they left",
            ", ".join(entry.name for entry in found),
        )
        return []
    return list(found)


def attach(model: Any, stack: Sequence[Entry]) -> None:
    """Let a model in memory know its edits."""
    setattr(model, _ATTRIBUTE, list(stack))


def write_stack(folder: Path, stack: Sequence[Entry]) -> None:
    """Put the edits into a checkpoint's folder, which has none yet."""
    if not stack:
        return
    place = folder / FOLDER
    place.mkdir()
    for entry in stack:
        file = place / f"{entry.name}.safetensors"
        if isinstance(entry.patch, Patch):
            tensors, note = entry.patch.stored()
            keep(file, tensors, entry.of, note)
        else:
            try:
                verified(entry.patch, entry.of)
            except BadCheckpoint as error:
                raise BadCheckpoint(f"{entry.patch}, which is to go along, is not what was read: {error}") from None
            link(entry.patch, file)
        entry.bytes = file.stat().st_size
        write_text(place / f"{entry.name}.md", entry.card.markdown())
    keep_json(place / LIST, {"edits": [entry.described() for entry in stack]}, _OF)


def read_stack(folder: str | Path) -> list[Entry]:
    """The edits that lie beside a checkpoint, oldest first; BadCheckpoint where there are none, or they are damaged."""
    folder = Path(folder).expanduser()
    file = folder / FOLDER / LIST
    if not folder.is_dir():
        raise BadCheckpoint(f"there is no folder {folder}")
    if not file.is_file():
        if (folder / EARLIER).is_file():
            raise BadCheckpoint(
                f"{folder} was edited by an early version of Transect, whose {EARLIER} this one does not read: take "
                "the edit back with that version, or edit the original model again"
            )
        raise BadCheckpoint(f"{folder} holds no edit that could be taken back: it has no file {FOLDER}/{LIST}")
    try:
        return _parsed(verified_json(file, _OF), folder / FOLDER)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{file} is not what Transect wrote there: {error}") from None


def _parsed(value: Mapping[str, Any], place: Path) -> list[Entry]:
    try:
        stack = [_entry(one, place) for one in value["edits"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"an edit in it is not described as one ({error})") from None
    chained = all(later.before == earlier.after for earlier, later in pairwise(stack))
    if not stack or not chained or len({entry.name for entry in stack}) < len(stack):
        raise BadCheckpoint("its edits do not follow one another")
    return stack


def _entry(one: Any, place: Path) -> Entry:
    def strings(values: Any) -> list[str]:
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise TypeError("a list of texts is expected")
        return values

    def text(value: Any) -> str:
        return strings([value])[0]

    name, card = text(one["name"]), one["card"]
    if not _NAME.fullmatch(name):
        raise ValueError("a name is not one of an edit")
    measured = [(text(row[0]), float(row[1]), float(row[2])) for row in card["measured"]]
    changes = [
        {"matrix": text(row["matrix"]), "rank": int(row["rank"])}
        | {key: float(row[key]) for key in ("change", "relative", "entries")}
        for row in card["changes"]
    ]
    return Entry(
        name, text(one["made"]), strings(one["facts"]),
        Card(text(card["edit"]), dict(card["settings"]), measured, changes, dict(card["notes"])),
        text(one["before"]), text(one["after"]), None if one["reads"] is None else strings(one["reads"]),
        strings(one["writes"]), place / f"{name}.safetensors", int(one["bytes"]),
    )  # fmt: skip


def listed(stack: Sequence[Entry]) -> Group:
    """For the terminal: a table, and below it what each was about."""
    table = Table("name", "made", "edit", box=SIMPLE_HEAD)
    table.add_column("patch, KB", justify="right")
    table.add_column("depends on what is changed in", overflow="fold")
    for entry in stack:
        reads = "all weights" if entry.reads is None else _some(entry.reads, 2) or "none"
        table.add_row(
            entry.name, entry.made[:16].replace("T", " "), entry.card.edit, f"{entry.bytes / 1000:.1f}", reads
        )  # fmt: skip
    lines = []
    for entry in stack:
        matrices = _some([str(row["matrix"]) for row in entry.card.changes], 3)
        told = [_some(entry.facts, 3), f"in {matrices or 'no matrix'}", entry.success()]
        lines.append(Text(f" {entry.name}: {'; '.join(filter(None, told))}"))
    return Group(table, *lines)


def _some(texts: Sequence[str], most: int) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
