"""An edit is a function whose signature is its configuration.

`@editing(name, ...)` registers `function(specimen, journal, **settings)`. It reads the model through the specimen and
changes it through the journal alone, and returns what is worth writing down, or None. Its keyword-only parameters
with a default are settings, as a compression method's are. If it raises, the frame takes everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..data import Specimen
from ..errors import TransectError
from ..parameters import Entry

Measure = Callable[[Specimen], Mapping[str, float]]


@dataclass(frozen=True)
class Edit(Entry):
    """A registered edit.

    measure: what its card shows beside the general loss, before and after: `measure(specimen)`, numbers by name.
    check: `check(specimen, **settings)`, called before any work; raises TransectError.
    """

    family: ClassVar[str] = "edit"
    measure: Measure
    check: Callable[..., None] | None = None


_edits: dict[str, Edit] = {}


def editing(
    name: str, *, paper: str, measure: Measure, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an edit; see `Edit` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _edits[name] = Edit(name, paper, function, measure, check)
        return function

    return register


def edit(name: str) -> Edit:
    """The edit of that name, or an error that lists the known ones."""
    if name not in _edits:
        raise TransectError(f"unknown edit {name!r}; known: {', '.join(sorted(_edits))}")
    return _edits[name]


def edits() -> list[Edit]:
    """All registered edits, by name."""
    return [_edits[name] for name in sorted(_edits)]
