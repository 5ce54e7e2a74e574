"""What a comparison consists of: its settings, its rows, and where each is kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..compression import Recipe, allocation_named, method
from ..compression.allocation import needs_measure
from ..compression.recipe import goes_with
from ..errors import TransectError
from ..statistics import Statistic
from ..store import kept_json, read_json, write_text
from ..version import __version__

KIND = "a comparison"  # what its folder is, see `transect.store.Folder`
RUN = "run.json"  # the first file that is there, and the last that goes


@dataclass(frozen=True)
class Row:
    """One line of the table; method None is the dense model, or the finished one of that name in `beside`."""

    method: str | None
    allocation: str
    keep: float
    beside: str = ""

    @property
    def file(self) -> str:
        """Where it lies in the run folder; no two rows lie in one place."""
        if self.beside:
            return f"rows/beside_{quote(self.beside, safe='').replace('_', '%5F')}.json"
        if self.method is None:
            return "rows/dense.json"
        parts = (self.method, self.allocation, repr(self.keep))
        return f"rows/{'_'.join(quote(part, safe='').replace('_', '%5F') for part in parts)}.json"

    def __str__(self) -> str:
        if self.beside:
            return f"the finished model {self.beside}"
        return "the dense model" if self.method is None else f"{self.method} at {self.keep!r} ({self.allocation})"


@dataclass(frozen=True)
class Finished:
    """A finished model that stands beside the compressed ones.

    source: folder or hub name. done: what its record says that was done to it. computation: its fingerprint.
    """

    source: str
    done: str
    computation: str


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison, as they stand in run.json. Data are named by their fingerprints.

    model: folder or hub name, from which every process loads the same weights; `weights` is their fingerprint, and
        `computation` that of the weights and all else that decides what the model puts out.
    dtype, device, architecture: how another process opens it. settings: per method or allocation, its parameters.
    allocations: none for the own default of each method. facts: those that rows are asked, "" for none. also: other
        texts on which rows are judged, by name. Statistics and factorizations are kept whatever is asked, rows are not.
    beside: finished models that have rows of their own, by name. lengths: of prompts at which rows are measured.
    """

    model: str
    dtype: str
    device: str
    architecture: dict[str, Any]
    weights: str
    computation: str
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
    facts: str = ""
    also: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Finished] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """Dense first, finished models, then by method and allocation, from the largest share kept to the smallest.

        A method is combined with those of the allocations that it goes with; one that shares out the budget itself has
        one row a budget.
        """
        keeps = sorted(self.keeps, reverse=True)
        return [Row(None, "-", 1.0), *(Row(None, "-", 1.0, name) for name in self.beside)] + [
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
            sequential=self.sequential and bool(chosen.collects) and chosen.family != "restructuring",
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

    def is_factorized(self, name: str) -> bool:
        """Whether each matrix is factorized once by this method, for all of its rows."""
        chosen = method(name)
        in_order = self.sequential and chosen.collects  # such a row calibrates and factorizes on its own
        return chosen.family == "factorization" and not in_order

    @cached_property
    def fingerprint(self) -> str:
        """Hash (32 hexadecimal digits) of everything that decides a row's numbers, but not which rows there are.

        The kind of device is part of it, since every row holds speeds.
        """
        rows = ("methods", "allocations", "keeps", "facts", "also", "beside", "lengths")
        no_part = ("model", "device", "settings", *rows)
        decides = {key: value for key, value in asdict(self).items() if key not in no_part}
        decides |= {"transect": __version__, "device": self.device.split(":")[0]}
        decides["settings"] = {name: self._settings_of(name) for name, given in self.settings.items() if given}
        described = json.dumps(decides, sort_keys=True, default=str)
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def _settings_of(self, name: str) -> dict[str, Any]:
        """As they are used, however they were written."""
        chosen = method(name) if name in self.methods else allocation_named(name)
        return chosen.settings(self.settings[name])

    def of(self, *what: Any) -> str:
        """What a file of the run belongs to; what: of the run it holds."""
        return json.dumps([self.fingerprint, *what])

    def save(self, path: Path) -> None:
        """Write it as a run folder's run.json."""
        described = {**asdict(self), "fingerprint": self.fingerprint}
        write_text(path, json.dumps(described, indent=2, default=str) + "\n")

    def is_in(self, folder: Path) -> bool:
        """Whether the run in a run folder is this one, whichever rows it has."""
        try:
            return read_json(folder / RUN).get("fingerprint") == self.fingerprint
        except TransectError:  # there is none, or it is damaged
            return False

    def finished(self, folder: Path, row: Row) -> dict[str, Any] | None:
        """The row's result if it is in the run folder."""
        return kept_json(folder / row.file, self.of_row(row))

    def of_row(self, row: Row) -> str:
        """What the row's file belongs to."""
        asked = [part for part in (self.facts, dict(self.also), list(self.lengths)) if part]
        if row.beside:
            return self.of("beside", self.beside[row.beside].computation, *asked)
        return self.of("row", row.method, row.allocation, repr(row.keep), *asked)


def factors_file(name: str) -> str:
    """Where a method's factorizations lie in the run folder."""
    return f"factors/{quote(name, safe='')}.safetensors"
