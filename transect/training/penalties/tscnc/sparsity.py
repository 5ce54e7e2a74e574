"""The transformed L1 shape: between the sum of absolute values and the number of entries that are not 0."""

from __future__ import annotations

from torch import Tensor


def transformed(sizes: Tensor, a: float) -> Tensor:
    """(a + 1) u / (a + u) of sizes u >= 0, one by one: 0 at 0, 1 at 1, rising and concave, a + 1 at infinity.

    a -> 0 counts what is not 0, a -> infinity gives u itself. The slope at 0 is (a + 1) / a.
    """
    return (a + 1) * sizes / (a + sizes)
