"""What a contest of trainings consists of: its entrants, the trials of each, and where each is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..adaptation import Settings, way_named
from ..version import __version__
from .trials import Kept


@dataclass(frozen=True)
class Entrant:
    """One line of the table: a way of training, with so many trained numbers.

    share: of the numbers in the adapted matrices; None where the method has no size, as full training.
    """

    name: str
    share: float | None

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name} at {self.share:g}"


@dataclass(frozen=True)
class Trial:
    """One training. rate: the largest learning rate; None for the base model, which is only measured."""

    entrant: Entrant | None
    rate: float | None
    seed: int

    @property
    def file(self) -> str:
        """Where it lies in the run folder; no two trials lie in one place."""
        if self.entrant is None:
            return "trials/base.json"
        parts = (self.entrant.name, repr(self.entrant.share), repr(self.rate), str(self.seed))
        return f"trials/{'_'.join(quote(part, safe='').replace('_', '%5F') for part in parts)}.json"

    def __str__(self) -> str:
        return "the base model" if self.entrant is None else f"{self.entrant}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Plan(Kept):
    """The settings of a contest, as they stand in run.json. Data are named by their fingerprints.

    shared: what all trainings have in common; its method, options, lr and seed are replaced. adapters: with each one's
    options, as given. rates: factors of each adapter's own rate, which are tried. seeds: how many, from `shared.seed`
    on; the first one's held-out loss, on a part of the training text, chooses the rate.
    """

    model: str
    dtype: str
    device: str
    architecture: dict[str, Any]
    weights: str
    computation: str
    adapters: Mapping[str, Mapping[str, Any]]
    shares: tuple[float, ...]
    rates: tuple[float, ...]
    seeds: int
    shared: Settings
    training: str
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def entrants(self) -> list[Entrant]:
        """By method, from the fewest trained numbers to the most."""
        return [
            Entrant(name, share)
            for name in self.adapters
            for share in (sorted(self.shares) if way_named(name).size else [None])
        ]

    def grid(self, entrant: Entrant) -> list[Trial]:
        """The trials that choose the entrant's rate."""
        own = way_named(entrant.name).rate
        return [Trial(entrant, factor * own, self.shared.seed) for factor in sorted(self.rates)]

    def chosen(self, folder: Path, entrant: Entrant) -> Trial | None:
        """The trial of the grid with the least held-out loss; None while some have not run, or if all have failed."""
        found = [(trial, self.finished(folder, trial)) for trial in self.grid(entrant)]
        if any(result is None for _, result in found):
            return None
        able = [(result["loss_after"], trial) for trial, result in found if result and "loss_after" in result]
        return min(able, key=lambda one: one[0])[1] if able else None

    def others(self, trial: Trial) -> list[Trial]:
        """The same training with the other seeds."""
        first = self.shared.seed
        return [Trial(trial.entrant, trial.rate, first + number) for number in range(1, self.seeds)]

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hash (32 hexadecimal digits) of everything that decides a trial's numbers, but not which there are."""
        no_part = ("model", "device", "adapters", "shares", "rates", "seeds")
        decides = {key: value for key, value in asdict(self).items() if key not in no_part}
        decides |= {"transect": __version__, "device": self.device.split(":")[0]}
        described = json.dumps(decides, sort_keys=True, default=str)
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def of(self, trial: Trial) -> str:
        """What the trial's file belongs to."""
        if trial.entrant is None:
            return json.dumps([self.fingerprint, "base"])
        way = way_named(trial.entrant.name)
        options = {k: v for k, v in way.settings(self.adapters[way.name]).items() if k != way.size}
        return json.dumps([self.fingerprint, trial.file, options], sort_keys=True, default=str)
