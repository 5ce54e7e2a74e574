"""What an adaptation does, as one value: validated before any work, and written beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from ..arguments import Range, checked_fields
from ..checkpoint import Opened
from ..errors import TransectError
from ..goals import Goal, objective_named
from ..parameters import Seed
from ..training import Parametrization, Schedule, layer_rates_named, optimizer_named, penalty_named
from .registry import Adapter, way_named

Count = Annotated[int, Range(1, 2**31 - 1)]
Positive = Annotated[float, Range(0, above=True)]


@dataclass(frozen=True)
class Settings:
    """An adaptation.

    method: a registered adapter or parametrization. options: its settings.
    roles: matrices that are adapted; default every linear layer.
    objective, objective_options: a registered objective, what is lowered, and its settings.
    optimizer, optimizer_options: a registered optimizer and its settings.
    penalties: registered penalties, each with its settings, that are added to the loss.
    layer_rates: registered rates by layer, with their settings: by what the learning rate of each layer is multiplied.
    lr: the largest learning rate. Default: the method's.
    epochs: passes over the training sequences. steps: no more optimizer steps than this.
    batch_size: sequences in a batch. accumulate: batches in a step.
    held_out: share of the sequences, the last ones of the data, that is not trained on but chooses the best state.
    every: measure the held-out loss, and write the state, every so many steps. Default: a tenth of all steps.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] | None = None
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    penalties: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer_rates: str | None = None
    layer_rates_options: Mapping[str, Any] = field(default_factory=dict)
    lr: Positive | None = None
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 8
    accumulate: Count = 1
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    every: Count | None = None
    seed: Seed = 0
    objective: str = "own"
    objective_options: Mapping[str, Any] = field(default_factory=dict)

    def goal(self, opened: Opened) -> Goal:
        """What is lowered, for this model; TransectError for an objective that does not go with it."""
        return objective_named(self.objective).goal(opened, self.objective_options)

    @property
    def way(self) -> Adapter | Parametrization:
        """What is trained."""
        return way_named(self.method)

    def resolved(self) -> Settings:
        """The same with defaults filled in; TransectError for a value that means nothing."""
        chosen = checked_fields(self, "adapt")
        way, optimizer = way_named(chosen.method), optimizer_named(chosen.optimizer)
        rates = None if chosen.layer_rates is None else layer_rates_named(chosen.layer_rates)
        return replace(
            chosen,
            layer_rates_options={} if rates is None else rates.settings(chosen.layer_rates_options),
            options=way.settings(chosen.options),
            objective_options=objective_named(chosen.objective).settings(chosen.objective_options),
            optimizer_options=optimizer.settings(chosen.optimizer_options),
            penalties={name: penalty_named(name).settings(given) for name, given in chosen.penalties.items()},
            lr=way.rate if chosen.lr is None else chosen.lr,
        )

    def check_merges(self) -> None:
        """TransectError for an adapter that depends on what it reads, and so is no change of the weights."""
        if not self.way.merges:
            raise TransectError(f"{self.method} cannot be written into the weights: keep the adapter, without merge")

    @property
    def schedule(self) -> Schedule:
        """Of the training, once it is resolved: a short rise, then half a cosine down to 0."""
        assert self.lr is not None
        return Schedule(
            lr=self.lr, epochs=self.epochs, steps=self.steps, accumulate=self.accumulate, every=self.every,
            optimizer=self.optimizer, options=self.optimizer_options, seed=self.seed,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
