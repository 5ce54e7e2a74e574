"""What a repair does, as one value: validated before any work, and written into the checkpoint afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

from ..arguments import Range, checked_fields
from ..errors import TransectError
from ..parameters import Seed
from ..training import Schedule

How = Literal["lora", "full", "distill", "blocks"]
Train = Literal["lora", "full"]
Count = Annotated[int, Range(1, 2**31 - 1)]
Positive = Annotated[float, Range(0, above=True)]

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
    lr: Positive | None = None
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 8
    accumulate: Count = 1
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.05
    temperature: Positive = 1.0
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    every: Count | None = None
    seed: Seed = 0

    def resolved(self) -> Settings:
        """The same with `train` and `lr` filled in; TransectError for a value that means nothing."""
        chosen = checked_fields(self, "recover")
        implied = chosen.how if chosen.how in get_args(Train) else None
        if implied is not None and chosen.train not in (None, implied):
            raise TransectError(f"how={chosen.how!r} trains {implied!r}; train= is a choice of distill and blocks")
        train = chosen.train or implied or "full"
        return replace(chosen, train=train, lr=_LEARNING_RATE[train] if chosen.lr is None else chosen.lr)

    @property
    def schedule(self) -> Schedule:
        """Of the trainings that it consists of, once it is resolved: AdamW without decay, and half a cosine (ours)."""
        assert self.lr is not None
        return Schedule(
            lr=self.lr, epochs=self.epochs, steps=self.steps, accumulate=self.accumulate, every=self.every,
            seed=self.seed,
        )  # fmt: skip

    @property
    def needs_teacher(self) -> bool:
        """Whether it follows a dense model."""
        return self.how in ("distill", "blocks")

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the structure record's history."""
        return asdict(self)
