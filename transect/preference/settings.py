"""What the training of a reward model does, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from ..arguments import Range, checked_fields
from ..parameters import Seed
from ..training import Schedule

Count = Annotated[int, Range(1, 2**31 - 1)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclass(frozen=True)
class Settings:
    """How a reward model is trained.

    rank, alpha, dropout, roles: of the aspects' LoRA (the paper has rank and alpha 32), and the matrices that get it;
        roles None for every linear layer.
    base_share: of the prompts of a category without an aspect, the share for backbone and value head; the others are
        for the aggregator. All of them where a category has no aspects.
    lr, aspect_lr, aggregator_lr, router_lr: largest learning rates. The paper's, with one prompt a step, are 1e-7,
        5e-5, 1e-6 and 3e-8; the first and the last of these hardly move anything (our defaults are larger).
    epochs: passes over the pairs, in each phase. steps: no more steps than this in a phase.
    batch_size: pairs in a step. held_out: share of each phase's prompts that only chooses the state that is kept.
    every: measure the held-out loss, and write the state, every so many steps. Default: a tenth of all steps.
    """

    rank: Count = 16
    alpha: Positive = 16.0
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.05
    roles: Sequence[str] | None = ("q", "v")
    base_share: Share = 0.6
    lr: Positive = 1e-5
    aspect_lr: Positive = 3e-4
    aggregator_lr: Positive = 1e-3
    router_lr: Positive = 1e-5
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 8
    held_out: Share = 0.1
    every: Count | None = None
    seed: Seed = 0

    def resolved(self) -> Settings:
        """The same; TransectError for a value that means nothing."""
        chosen = checked_fields(self, "the reward model")
        return replace(chosen, roles=None if chosen.roles is None else tuple(chosen.roles))

    @property
    def lora(self) -> dict[str, Any]:
        """Settings of the aspects' adapters."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}

    def schedule(self, lr: float) -> Schedule:
        """Of one phase."""
        return Schedule(lr=lr, epochs=self.epochs, steps=self.steps, every=self.every, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
