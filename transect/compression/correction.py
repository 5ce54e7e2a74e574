"""Integers with a low-rank correction of what rounding lost: what a budget pays for, and the best correction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import OutOfReach
from ..operators import LowRank
from ..operators.corrected import Corrected
from ..operators.grouped_integer import BITS, GroupedInteger, grouped_integer_bytes
from .registry import Size
from .weighted_svd import weighted_svd


def corrected_size(
    shape: tuple[int, int], itemsize: int, keep: float, *, group: int, symmetric: bool, **settings: Any
) -> Size:
    """The most bits that leave bytes for a rank of 1 or more, and the rank that the rest pays for.

    Ours: the papers fix both. On matrices of SmolLM2, 4 bits with a rank of 3 to 12 leave a quarter of the output error
    that 3 bits leave with the rank that costs as much, 21 to 39.
    """
    d_out, d_in = shape
    dense, a_rank = d_out * d_in * itemsize, (d_out + d_in) * itemsize
    for bits in reversed(BITS):
        integers = grouped_integer_bytes(d_out, d_in, bits, group, symmetric, itemsize)
        rank = int((keep * dense - integers) // a_rank)
        if rank >= 1:
            return Size(integers + rank * a_rank, {"bits": bits, "rank": rank})
    least = grouped_integer_bytes(d_out, d_in, BITS[0], group, symmetric, itemsize) + a_rank
    raise OutOfReach(
        f"{BITS[0]} bits in groups of {group} and a correction of rank 1 store {least / dense:.4f} of a {d_out} x "
        f"{d_in} matrix of {itemsize}-byte numbers, and keep={keep:g} is less; raise it, or take larger groups"
    )


def corrected(weight: Tensor, integers: GroupedInteger, rank: int, metric: Tensor) -> Corrected:
    """Q + L R with tr((W - Q - L R) A (W - Q - L R)ᵀ) as small as the rank allows.

    weight: W (d_out x d_in). integers: Q. metric: A (d_in x d_in), or its diagonal (d_in); see `weighted_svd`.
    """
    left, right = weighted_svd(weight - integers.to_dense().detach(), input_metric=metric).truncate(rank)
    return Corrected(integers, LowRank.from_factors(left, right))
