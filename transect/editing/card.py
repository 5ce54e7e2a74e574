"""The card of an edit: what was measured before and after, and how large the change was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table


@dataclass(frozen=True)
class Card:
    """edit, settings: what was done. measured: (name, before, after). changes: a row for each changed matrix, see
    `Journal.changes`. notes: what the edit itself reports."""

    edit: str
    settings: Mapping[str, Any]
    measured: Sequence[tuple[str, float, float]]
    changes: Sequence[Mapping[str, Any]]
    notes: Mapping[str, Any]

    def __getitem__(self, name: str) -> tuple[float, float]:
        """A measurement before and after."""
        return next((before, after) for known, before, after in self.measured if known == name)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def tables(self) -> Group:
        """For the terminal."""
        measured = Table("measured", box=SIMPLE_HEAD, title=f"{self.edit}: before and after", title_justify="left")
        measured.add_column("before", justify="right")
        measured.add_column("after", justify="right")
        for name, before, after in self.measured:
            measured.add_row(name, _written(before), _written(after))
        changes = Table("changed matrix", box=SIMPLE_HEAD)
        for heading in ("size / norm", "rank", "entries changed"):
            changes.add_column(heading, justify="right")
        for row in self.changes:
            changes.add_row(row["matrix"], f"{row['relative']:.2e}", str(row["rank"]), f"{row['entries']:.2%}")
        return Group(measured, changes)

    def markdown(self) -> str:
        """For the folder of the result."""
        lines = [f"# {self.edit}", "", "| measured | before | after |", "| :--- | ---: | ---: |"]
        lines += [f"| {name} | {_written(before)} | {_written(after)} |" for name, before, after in self.measured]
        lines += ["", "| changed matrix | size / norm | rank | entries changed |", "| :--- | ---: | ---: | ---: |"]
        lines += [
            f"| {row['matrix']} | {row['relative']:.2e} | {row['rank']} | {row['entries']:.2%} |"
            for row in self.changes
        ]
        lines += ["", *(f"- {name}: {value}" for name, value in {**self.settings, **self.notes}.items())]
        return "\n".join(lines) + "\n"


def _written(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
