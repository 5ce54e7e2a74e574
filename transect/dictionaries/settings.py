"""What can be chosen of a dictionary's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..arguments import Range, checked_fields
from ..parameters import Seed


@dataclass(frozen=True)
class Settings:
    """expansion: features for each number of a vector. l1: weight c of the sum of activations against the squared
    error. normalise: scale the vectors so that their mean length is √D while training; c then means the same in every
    layer and model. The dictionary that comes out is of the vectors as they are. tokens: vectors to train on; a text
    that has fewer is gone through again. batch: vectors a step. buffer: vectors that are in memory at once, and mixed.
    lr: learning rate. warm_up: share of the steps over which c rises from 0. bias: where b_dec starts, at zero or at
    the geometric median of the vectors. resamplings: how often dead features are given a new direction, at equal
    distances. first: whether a sequence's first token is taken as well. seed: of the start and the order.

    The paper, for GPT-2 with 10^8 tokens: expansion 32, c from 0.8 to 3 by layer without `normalise`, batch 4096, a
    buffer of 384 batches, lr 1.2e-3, no warm-up of c, b_dec at zero, 4 resamplings, first tokens included. Smaller
    sizes, `normalise` and the median are ours: a short training does not move b_dec far.
    """

    expansion: Annotated[int, Range(1, 1024)] = 8
    l1: Annotated[float, Range(0)] = 2.0
    normalise: bool = True
    tokens: Annotated[int, Range(1)] = 200_000
    batch: Annotated[int, Range(1)] = 256
    buffer: Annotated[int, Range(1)] = 65_536
    lr: Annotated[float, Range(0, above=True)] = 1.2e-3
    warm_up: Annotated[float, Range(0, 1)] = 0.0
    bias: Literal["median", "zero"] = "median"
    resamplings: Annotated[int, Range(0, 100)] = 4
    first: bool = False
    seed: Seed = 0

    def checked(self) -> Settings:
        """The same with values of the right types; TransectError for one that means nothing."""
        return checked_fields(self, "a dictionary")

    @property
    def steps(self) -> int:
        """Of the training."""
        return max(1, self.tokens // self.batch)
