"""How much of each model there is in the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import TransectError


def shares_of(weights: str, count: int, owner: str) -> list[float]:
    """A number for each of so many models, from a text such as "0.7,0.3"; equal ones for an empty one.

    TransectError unless they are as many as the models, none is below 0, and they add up to 1.
    """
    if not weights.strip():
        return [1 / count] * count
    try:
        found = [float(part) for part in weights.split(",")]
    except ValueError:
        found = []
    if len(found) != count or min(found) < 0 or not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise TransectError(
            f"{owner}: weights={weights!r} should be {count} numbers from 0 that add up to 1, one for each model, "
            "with commas in between"
        )
    return found


def mean_of(models: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Σ share · tensor, name by name, in float32 at least; exactly a model's own numbers where its share is 1."""
    found = {}
    for name, first in models[0].items():
        total = None
        for model, share in zip(models, shares, strict=True):
            if share == 0:
                continue
            wide = model[name] if first.dtype.itemsize > 4 else model[name].float()
            total = share * wide if total is None else total + share * wide
        found[name] = total
    return found
