"""What a contest of parts consists of: its entrants, their trials, and where each is kept."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...version import __version__
from ..trials import Kept
from .sizes import Equal


@dataclass(frozen=True)
class Combination:
    """One line of the table: the part that stands in each slot, as (slot, name); the base's own where none is named."""

    parts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " + ".join(name for _, name in self.parts) or "base"


@dataclass(frozen=True)
class PartsTrial:
    """One training from scratch. rate: the largest learning rate. seed: of the numbers at the start and of the data."""

    entrant: Combination
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """Where it lies in the run folder; no two trials lie in one place."""
        parts = [text for pair in self.entrant.parts for text in pair]
        words = (quote(part, safe="").replace("_", "%5F") for part in (*parts, repr(self.rate), str(self.seed)))
        return f"trials/{'_'.join(words)}.json"

    def __str__(self) -> str:
        return f"{self.entrant}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class SpeedTrial:
    """How fast an entrant's model is with sequences of that length, and what memory it takes."""

    entrant: Combination
    length: int

    @property
    def file(self) -> str:
        """Where it lies in the run folder."""
        parts = [text for pair in self.entrant.parts for text in pair]
        words = (quote(part, safe="").replace("_", "%5F") for part in (*parts, str(self.length)))
        return f"speeds/{'_'.join(words)}.json"

    def __str__(self) -> str:
        return f"{self.entrant}, speed at {self.length} positions"


@dataclass(frozen=True)
class PartsPlan(Kept):
    """The settings of a contest, as they stand in run.json.

    slots: slot -> the names of the parts that are tried in it (`base` for the model's own); every combination enters.
    settings: part -> its settings. sizes: of the base. equal, wanted: what agrees within 1 %, and its count.
    task, options: what is learned. source: what its examples are made from, if the options do not say it all. lengths:
    at which speed is measured. examples are drawn anew for every step: steps x batch of them. rates: the grid, the
    same for each entrant. seeds: how many; the first one chooses the rate.
    """

    base: str
    slots: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int | None]
    equal: Equal
    wanted: int
    task: str
    options: Mapping[str, Any]
    source: str
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int
    seed: int
    held_out: int
    optimizer: str
    optimizer_options: Mapping[str, Any]
    device: str
    lengths: tuple[int, ...] = ()

    @property
    def entrants(self) -> list[Combination]:
        """Every combination of parts, in the order in which they were named."""
        slots = list(self.slots)
        return [
            Combination(tuple((slot, name) for slot, name in zip(slots, names, strict=True) if name != "base"))
            for names in itertools.product(*(self.slots[slot] for slot in slots))
        ]

    def grid(self, entrant: Combination) -> list[PartsTrial]:
        """The trials that choose the entrant's rate."""
        return [PartsTrial(entrant, rate, self.seed) for rate in sorted(self.rates)]

    def chosen(self, folder: Path, entrant: Combination) -> PartsTrial | None:
        """The trial of the grid with the least validation loss; None while one has not run, or if all failed."""
        found = [(trial, self.finished(folder, trial)) for trial in self.grid(entrant)]
        if any(result is None for _, result in found):
            return None
        able = [(result["validation"], trial) for trial, result in found if result and "validation" in result]
        return min(able, key=lambda one: one[0])[1] if able else None

    def others(self, trial: PartsTrial) -> list[PartsTrial]:
        """The same training with the other seeds."""
        return [PartsTrial(trial.entrant, trial.rate, self.seed + number) for number in range(1, self.seeds)]

    def reference(self, entrant: Combination) -> Combination | None:
        """What its speed is compared with: the same with the model's own attention; None for what is that itself."""
        mixer = dict(entrant.parts).get("mixer")
        if mixer in (None, "softmax"):
            return None
        return Combination(tuple(pair for pair in entrant.parts if pair[0] != "mixer"))

    @property
    def speeds(self) -> list[SpeedTrial]:
        """All measurements of speed, those of what others are compared with included, the short ones first."""
        entrants = [one for entrant in self.entrants for one in (self.reference(entrant), entrant) if one is not None]
        return [SpeedTrial(one, length) for length in sorted(self.lengths) for one in dict.fromkeys(entrants)]

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hash (32 hexadecimal digits) of everything that decides a trial's numbers, but not which there are."""
        no_part = ("slots", "settings", "rates", "seeds", "seed", "lengths")
        decides = {key: value for key, value in asdict(self).items() if key not in no_part}
        described = json.dumps({**decides, "transect": __version__}, sort_keys=True, default=str)
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def of(self, trial: PartsTrial | SpeedTrial) -> str:
        """What the trial's file belongs to."""
        settings = {name: dict(self.settings.get(name, {})) for _, name in trial.entrant.parts}
        return json.dumps([self.fingerprint, trial.file, settings], sort_keys=True, default=str)
