"""An edit is a function whose signature is its configuration.

`@editing(name, ...)` registers `function(specimen, journal, **settings)`. It reads the model through the specimen and
changes it through the journal alone, and returns what is worth writing down, or None. Its keyword-only parameters
with a default are settings, as a compression method's are. If it raises, the frame takes everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    reads: `reads(specimen, **settings)`, names of the parameters that decide what is changed by how much. None for all:
        right for whatever looks at what the model puts out. An earlier edit of none of them can be taken out from under
        this one, which is then made again from its patch.
    of_facts: whether it is the specimen's facts that it rewrites.
    """

    family: ClassVar[str] = "edit"
    measure: Measure
    check: Callable[..., None] | None = None
    reads: Callable[..., Iterable[str]] | None = None
    of_facts: bool = False


_edits: dict[str, Edit] = {}


def editing(
    name: str,
    *,
    paper: str,
    measure: Measure,
    check: Callable[..., None] | None = None,
    reads: Callable[..., Iterable[str]] | None = None,
    of_facts: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an edit; see `Edit` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _edits[name] = Edit(name, paper, function, measure, check, reads, of_facts)
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
