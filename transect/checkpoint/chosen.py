"""Are the settings of a record's parts such as a user could choose? A checkpoint's own modeling file does not ask."""

from __future__ import annotations

from typing import Any

from ..anatomy.record import StructureRecord
from ..errors import BadCheckpoint, TransectError
from ..parts import parts


def check_chosen(record: StructureRecord) -> None:
    """Raise BadCheckpoint where a part has a setting beyond what it takes: it might compute without end."""
    known = {entry.function.kind: entry for entry in parts()}
    waiting: list[tuple[str, Any]] = list(record.modules.items())
    while waiting:
        path, described = waiting.pop()
        if isinstance(described, list):
            waiting += [(path, inside) for inside in described]
        if not isinstance(described, dict):
            continue
        waiting += [(path, inside) for inside in described.values()]
        kind = described.get("kind")
        if isinstance(kind, str) and kind in known:
            chosen = {parameter.name for parameter in known[kind].parameters}
            try:
                known[kind].settings({name: described[name] for name in described.keys() & chosen})
            except TransectError as error:
                raise BadCheckpoint(f"the structure record's entry for {path!r} cannot be built: {error}") from None
