"""Reading JSON that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BadCheckpoint

LARGEST = 256 * 2**20  # bytes; an index of a million tensors has half of that


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; BadCheckpoint if it is missing, too large, damaged, or something else."""
    found = read_any_json(file)
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{file} should hold a JSON object, but holds a {type(found).__name__}")
    return found


def read_any_json(file: Path) -> Any:
    """Whatever JSON a file holds; BadCheckpoint if there is none."""
    try:
        if not file.is_file():
            raise BadCheckpoint(f"{file.parent} has no file {file.name}")
        if file.stat().st_size > LARGEST:
            raise BadCheckpoint(f"{file} has {file.stat().st_size} bytes, and JSON is read up to {LARGEST}")
        return parsed(file.read_text(encoding="utf-8"))
    except BadCheckpoint:
        raise
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON, a number of too many digits
        raise BadCheckpoint(f"{file} cannot be read: {error}") from None


def in_short(what: object, most: int = 200) -> str:
    """What something says, as one line of at most so many characters: for a message that quotes what others wrote."""
    text = " ".join((str(what) if isinstance(what, BaseException) else repr(what)).split())
    return text if len(text) <= most else text[: most - 4] + " ..."


def parsed(text: str) -> Any:
    """What a JSON text says; ValueError with a reason for what is none, or is deeper than anybody writes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
