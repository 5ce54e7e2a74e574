"""What a repair does, as one value: validated before any work, and written into the checkpoint afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..errors import TransectError

How = Literal["lora", "full", "distill", "blocks"]
Train = Literal["lora", "full"]

_LEARNING_RATE = {"lora": 3e-4, "full": 1e-4}


@dataclass(frozen=True)
class Settings:
    """A repair.

    how: "lora" and "full" lower the model's own loss on the data; "distill" brings its logits, and "blocks" the output
        of each of its blocks, closer to those of the dense model.
    train: which weights change: low-rank updates of the linear layers ("lora"), or every number of the blocks
        ("full"). Default: what `how` says, and "full" for the two distillations.
    lr: the largest learning rate. Default 3e-4 for LoRA (AMP's fine-tuning), 1e-4 otherwise (our choice).
    epochs: passes over the training sequences (in "blocks" for each block). steps: no more optimiser steps than this.
    batch_size: sequences in a batch. accumulate: batches in a step.
    rank, alpha, dropout: of LoRA (the defaults are AMP's and SVD-LLM's). temperature: of the logits in "distill".
    held_out: share of the sequences that is not trained on, but measures the loss; the last ones of the data.
    every: measure the held-out loss, and write the state, every so many steps. Default: a tenth of all steps.
    """

    how: How = "lora"
    train: Train | None = None
    lr: float | None = None
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    temperature: float = 1.0
    held_out: float = 0.1
    every: int | None = None
    seed: int = 0

    def resolved(self) -> Settings:
        """The same with `train` and `lr` filled in; TransectError for a value that means nothing."""
        if self.how not in get_args(How):
            raise TransectError(f"there is no repair {self.how!r}; how is one of {', '.join(get_args(How))}")
        implied = self.how if self.how in get_args(Train) else None
        if self.train is not None and self.train not in get_args(Train):
            raise TransectError(f"train is one of {', '.join(get_args(Train))}, got {self.train!r}")
        if implied is not None and self.train not in (None, implied):
            raise TransectError(f"how={self.how!r} trains {implied!r}; train= is a choice of distill and blocks")
        for name in ("epochs", "steps", "batch_size", "accumulate", "rank", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TransectError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "alpha", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise TransectError(f"{name} must be above 0, got {value}")
        if not 0 <= self.dropout < 1:
            raise TransectError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 < self.held_out < 1:
            raise TransectError(f"held_out is a share of the sequences, above 0 and below 1, got {self.held_out}")
        train = self.train or implied or "full"
        return replace(self, train=train, lr=_LEARNING_RATE[train] if self.lr is None else self.lr)

    @property
    def needs_teacher(self) -> bool:
        """Whether it follows a dense model."""
        return self.how in ("distill", "blocks")

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the structure record's history."""
        return asdict(self)
