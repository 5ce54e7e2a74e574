"""The parts there are, by slot and name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..errors import TransectError
from ..parameters import Entry, Parameter, parameters_of, settings_of
from .part import Part

SLOTS = ("mixer", "mlp", "activation", "matrix", "norm", "block")  # in the order in which they are filled


@dataclass(frozen=True)
class PartEntry(Entry):
    """A registered part; `function` is its class."""

    family: str

    @property
    def parameters(self) -> list[Parameter]:
        """The settings that a user can choose."""
        return parameters_of(self.function.__init__, self.function)

    def settings(self, given: Any) -> dict[str, Any]:
        """All settings: the ones given, validated, and the defaults of the others."""
        return settings_of(self.function.__init__, self.name, given)

    @property
    def sizes(self) -> list[str]:
        """The sizes that its constructor asks for."""
        parameters = inspect.signature(self.function.__init__).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


def parts(slot: str | None = None) -> list[PartEntry]:
    """All registered parts, or those of a slot, by name."""
    found, waiting = [], [Part]
    while waiting:
        for one in waiting.pop().__subclasses__():
            waiting.append(one)
            if "kind" in vars(one) and slot in (None, one.slot):
                found.append(PartEntry(one.kind.partition(".")[2], one.paper, one, one.slot))
    return sorted(found, key=lambda entry: (SLOTS.index(entry.family), entry.name))


def part_named(slot: str, name: str) -> PartEntry:
    """The part of that name for a slot, or an error that lists those there are.

    In the slot of norms also a part around blocks that does nothing but place norms.
    """
    if slot not in SLOTS:
        raise TransectError(f"unknown slot {slot!r}; known: {', '.join(SLOTS)}")
    found = {entry.name: entry for entry in parts(slot)}
    if slot == "norm":
        found |= {entry.name: entry for entry in parts("block") if entry.function.places_norms}
    if name not in found:
        raise TransectError(f"unknown {slot} {name!r}; known: {', '.join(found)}")
    return found[name]
