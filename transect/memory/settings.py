"""What a user can choose of a memory and of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..arguments import Range, checked_fields
from ..parameters import Seed


@dataclass(frozen=True)
class Settings:
    """blocks: of the network, each an MLP of four times the model's width with a norm and a sum around it.

    neighbours: of a position, whose next tokens are imitated. temperature: their weights are exp(-distance² / this);
    0 is a fifth of the median squared distance of the last neighbour. imitation: share of the loss that is the
    distance from them, the rest is the loss of the token that came next. epochs, batch (of positions), lr: of the
    training. held_out: share of the sequences, the last ones, which choose the best state and the share of the memory
    in the mixture. seed: of the network and of the order.
    """

    blocks: Annotated[int, Range(1, 1024)] = 4
    neighbours: Annotated[int, Range(1, 4096)] = 64
    temperature: Annotated[float, Range(0)] = 0.0
    imitation: Annotated[float, Range(0, 1)] = 0.5
    epochs: Annotated[int, Range(1)] = 5
    batch: Annotated[int, Range(1)] = 512
    lr: Annotated[float, Range(0, above=True)] = 1e-3
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    seed: Seed = 0

    def checked(self) -> Settings:
        """The same with values of the right types; TransectError for one that means nothing."""
        return checked_fields(self, "memorize")
