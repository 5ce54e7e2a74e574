"""What a search does, as one value: validated before any work, and written beside its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from ..arguments import Range, checked_fields
from ..errors import TransectError
from ..parameters import Seed
from ..training import Schedule
from .registry import searcher

Count = Annotated[int, Range(1, 2**31 - 1)]
Share = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclass(frozen=True)
class Settings:
    """A search.

    method: a registered one. options: its settings.
    sizes: of `neurons`, `heads` (key/value heads), `depth` and `hidden` (the stream's width), those to choose from.
        Default: quarters of the neurons and heads. shared: one number of neurons and of heads for all blocks.
    keep: the network has at most this share of the numbers in the model's matrices.
    penalty: what the whole model's numbers cost in nats, added to the loss by share: of the numbers above `keep`, or
        where there is none of all. Without a price the largest network would always win.
    lr: the largest learning rate of the weights, which all networks share; 0 leaves them as they are.
    epochs: passes over the training sequences. steps: no more than this. batch_size: sequences in a batch.
    validation: share of the sequences, without the held-out ones, that only choose sizes.
    held_out: share of the sequences, the last ones of the data, that only judge the result.
    every: write the state every so many steps. Default: a tenth of all steps.
    """

    method: str = "tanglenas"
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shared: bool = False
    keep: Annotated[float, Range(0, 1, above=True)] | None = None
    penalty: Annotated[float, Range(0)] = 1.0
    lr: Annotated[float, Range(0)] = 1e-4
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 8
    validation: Share = 0.5
    held_out: Share = 0.1
    every: Count | None = None
    seed: Seed = 0

    def resolved(self) -> Settings:
        """The same with defaults filled in; TransectError for a value that means nothing."""
        chosen = checked_fields(self, "search")
        if chosen.keep is None and chosen.penalty == 0:
            raise TransectError(
                "penalty=0 without keep: the largest sizes always win. Give keep (the share of the numbers that may "
                "stay), or a penalty (what the whole model's numbers cost, in nats)"
            )
        return replace(chosen, options=searcher(chosen.method).settings(chosen.options))

    def schedule(self, lr: float) -> Schedule:
        """Of the training, at this largest rate: a short rise, then half a cosine down to 0."""
        return Schedule(lr=lr, epochs=self.epochs, steps=self.steps, every=self.every, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
