"""Codes and scales shared by rows that are alike, learned together with the weights' assignment to them."""

from typing import Annotated, Any

import torch
from torch import Tensor

from ....errors import OutOfReach
from ....operators.codebook import MOST_BITS, Codebook, Mode, codebook_bytes
from ....statistics import InputCovariance
from ...registry import Range, Seed, Size, replacement
from .assignment import Surrogate
from .coding import started
from .learning import learn


def size(shape: tuple[int, int], itemsize: int, keep: float, *, groups: int, mode: Mode, **settings: Any) -> Size:
    """The most bits that the budget pays for."""
    d_out, d_in = shape
    if groups > d_out:
        raise OutOfReach(f"a {d_out} x {d_in} matrix has too few rows for groups={groups}; set {d_out} or fewer")
    dense, stored = d_out * d_in * itemsize, 0
    for bits in range(MOST_BITS, 0, -1):
        stored = codebook_bytes(d_out, d_in, bits, groups, mode, itemsize)
        if stored <= keep * dense:
            return Size(stored, {"bits": bits})
    raise OutOfReach(
        f"1 bit a weight, codes, scales and the groups of rows store {stored / dense:.4f} of a {d_out} x {d_in} matrix "
        f"of {itemsize}-byte numbers, and keep={keep:g} is less; raise it, or take fewer groups"
    )


@replacement("jlcm", paper="arXiv:2309.17361", size=size, even=True, needs=[InputCovariance()])
def jlcm(
    weight: Tensor,
    covariance: Tensor,
    *,
    bits: int,
    groups: Annotated[int, Range(1, 256)] = 16,
    mode: Mode = "scale",
    steps: Annotated[int, Range(0, 100_000)] = 200,
    surrogate: Surrogate = "proximal",
    seed: Seed = 42,
) -> Codebook:
    """Store each weight as one of a few learned codes, with a scale or codes of its own for each group of alike rows.

    Rows are grouped by k-means of their quantiles, and codes begun by k-means of the weights. Then codes, scales and
    the weights' assignment to codes are learned together, to lower E||(W - Ŵ) x||², which needs the covariance of the
    inputs alone. We know the paper's abstract and reviews only: features, rates and number of steps are ours.

    bits: of a code's number, 1 to 8, the most that the budget pays for.

    groups: of rows.
    mode: `scale`, one codebook, multiplied by a scale for each group; or `multi`, a codebook for each group.
    steps: of learning; 0 is plain k-means.
    surrogate: `proximal`, the paper's, moves weights to neighbouring codes only; `soft` is what it compares itself
        with, a softmax over all codes, for which a matrix takes 2^bits numbers a weight of memory.
    seed: of the groups' starts.
    """
    unit = _power_of_two(weight.square().mean().sqrt())
    working, metric = (weight / unit).float(), covariance / covariance.diagonal().mean().clamp_min(1e-300)
    coding = started(working, bits, groups, mode, seed)
    if steps and covariance.any():
        coding = learn(working, metric.float(), coding, steps, surrogate)
    codes, scale = coding.codes.to(weight), coding.scale
    if scale is None:
        return Codebook.from_codes(coding.indices, coding.labels, codes * unit, None)
    return Codebook.from_codes(coding.indices, coding.labels, codes, scale.to(weight)[:, 0] * unit)


def _power_of_two(number: Tensor) -> Tensor:
    """The one just above it, so that dividing by it rounds nothing; 1 for 0."""
    return torch.ldexp(torch.ones_like(number), number.frexp().exponent)
