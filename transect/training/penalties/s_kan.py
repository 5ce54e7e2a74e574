"""The entropy of S-KAN's selections: it makes nodes decide for a family before the others are pruned."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ...parameters import Range
from ...parts.catalog.s_kan import entropy
from .registry import Seen, penalty


@penalty("s-kan", paper="arXiv:2408.08338")
def s_kan(seen: Seen, *, weight: Annotated[float, Range(0)] = 1e-3) -> Tensor:
    """The mean entropy of the shares that a node's families of functions have, in nats.

    A model without an S-KAN part that still selects has none: TransectError.

    weight: of the penalty.
    """
    return weight * entropy(seen.model)
