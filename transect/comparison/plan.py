"""What a comparison consists of: its settings, its rows, and where each is kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..compression import Recipe, method
from ..compression.allocation import needs_measure
from ..compression.recipe import goes_with
from ..errors import TransectError
from ..statistics import Statistic
from ..store import replacing


@dataclass(frozen=True)
class Row:
    """One line of the table; method None is the dense model."""

    method: str | None
    allocation: str
    keep: float

    @property
    def name(self) -> str:
        """Of the row's file, without its ending."""
        return "dense" if self.method is None else f"{self.method}_{self.allocation}_{self.keep:g}"


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison, as they stand in run.json. Data are named by their fingerprints.

    model: folder or hub name, from which every process loads the same weights; `weights` is their fingerprint.
    dtype, device, architecture: how another process opens it. settings: per method or allocation, its parameters.
    allocations: none for the own default of each method.
    """

    model: str
    dtype: str
    device: str
    architecture: dict[str, Any]
    weights: str
    methods: tuple[str, ...]
    allocations: tuple[str, ...]
    keeps: tuple[float, ...]
    settings: dict[str, dict[str, Any]]
    calibration: str
    evaluation: str
    roles: tuple[str, ...] | None
    fisher: str
    accumulate: str
    seed: int
    sequential: bool
    refit: bool

    @property
    def rows(self) -> list[Row]:
        """Dense first, then by method and allocation, from the largest share kept to the smallest.

        A method is combined with those of the allocations that it goes with; one that shares out the budget itself has
        one row a budget.
        """
        keeps = sorted(self.keeps, reverse=True)
        return [Row(None, "-", 1.0)] + [
            Row(name, allocation, keep)
            for name in self.methods
            for allocation in self.allocations_of(name)
            for keep in keeps
        ]

    def allocations_of(self, name: str) -> list[str]:
        """The plan's allocations that a method goes with."""
        if method(name).family == "restructuring":
            return ["uniform"]
        if not self.allocations:
            return [method(name).allocation]
        found = [allocation for allocation in self.allocations if goes_with(method(name), allocation)]
        if not found:
            raise TransectError(f"{name} goes with none of the allocations {', '.join(self.allocations)}; add uniform")
        return found

    def recipe(self, row: Row) -> Recipe:
        """What is done to the model for a row that is not the dense one."""
        assert row.method is not None
        chosen = method(row.method)
        return Recipe(
            row.method, row.keep, row.allocation,
            self.settings.get(row.method, {}), self.settings.get(row.allocation, {}),
            sequential=self.sequential and bool(chosen.needs) and chosen.family != "restructuring",
            refit=self.refit and chosen.refit,
        )  # fmt: skip

    @property
    def needs(self) -> list[Statistic]:
        """The union of the statistics of all rows, which one pass collects."""
        rows = [self.recipe(row) for row in self.rows if row.method is not None]
        return list(dict.fromkeys(statistic for recipe in rows for statistic in recipe.needs))

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Units of work: rows that share measurements of an allocation search stay together, the others stand alone."""
        together: dict[Any, list[Row]] = {}
        for row in rows:
            shared = row.method is not None and needs_measure(row.allocation)
            together.setdefault((row.method, row.allocation) if shared else row, []).append(row)
        return list(together.values())

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a row's numbers, but not which rows there are."""
        kept = {
            k: v for k, v in asdict(self).items() if k not in ("model", "device", "methods", "allocations", "keeps")
        }
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it into a run folder."""
        write_json(folder / "run.json", {**asdict(self), "fingerprint": self.fingerprint})

    @staticmethod
    def load(folder: Path) -> Plan | None:
        """The plan of a run folder, or None if it has none."""
        path = folder / "run.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            data.pop("fingerprint")
            lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
            return Plan(**{**data, **lists})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise TransectError(f"{path} is not a run of this version: {error}; choose another folder") from None


def write_json(path: Path, value: Any) -> None:
    """Write a file as a whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def row_path(folder: Path, row: Row) -> Path:
    """Where a row of the table lies in its run folder."""
    return folder / "rows" / f"{row.name}.json"


def finished(folder: Path, row: Row) -> dict[str, Any] | None:
    """The row's result if it is there and whole."""
    try:
        return json.loads(row_path(folder, row).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
