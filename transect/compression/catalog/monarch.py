"""Monarch projection: the nearest product of two block-diagonal matrices (Dao et al., ICML 2022, arXiv:2204.00595)."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor

from ...errors import OutOfReach
from ...operators.monarch import Monarch, monarch_shapes
from ..registry import Range, Size, replacement


def monarch_size(shape: tuple[int, int], itemsize: int, keep: float, *, blocks: int) -> Size:
    """The most channels whose factors fit: a channel costs blocks x (d_in + d_out), both rounded up to whole blocks."""
    d_out, d_in = shape
    (_, _, p), (_, s, _) = monarch_shapes(d_in, d_out, blocks, blocks, 1)
    a_channel = blocks**2 * (p + s)
    channels = min(math.floor(keep * d_out * d_in / a_channel), s, p)
    if channels < 1:
        raise OutOfReach(
            f"keep={keep:g} leaves no channel for a {d_out} x {d_in} matrix of {blocks} x {blocks} blocks: one needs "
            f"{a_channel / (d_out * d_in):.3f}; take fewer blocks"
        )
    return Size(itemsize * channels * a_channel, {"channels": channels})


@replacement("monarch", paper="arXiv:2204.00595", size=monarch_size)
def monarch(weight: Tensor, channels: int, *, blocks: Annotated[int, Range(1, 4096)] = 4) -> Monarch:
    """Replace each matrix by the nearest Monarch matrix: two block-diagonal factors with a shuffle between them.

    Every pair of an output and an input block is cut to the same rank, the number of channels, by its own SVD, which is
    optimal in the Frobenius norm. No data are used, and the order of the units decides what falls into one block. So
    on its own it mostly loses more than SVD of the same size; the paper trains the result afterwards. A size
    between two numbers of channels is rounded down.

    blocks: number of input and of output blocks, as many of one as of the other (the authors' projection may have
        different numbers); 1 is plain SVD, and the authors' layer has 4.
    """
    return Monarch.from_dense(weight, blocks, blocks, channels)
