"""Grids of a few bits: where their points lie, what they store, and how many bits a budget pays for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OutOfReach
from ..operators.grouped_integer import BITS, GroupedInteger, grouped_integer_bytes
from .registry import Size


@dataclass(frozen=True)
class Grid:
    """The points s (q - z), q = 0 ... 2^bits - 1, with one s and one z for each group of weights.

    scale: s, numbers of bfloat16, so that they are the same in whatever dtype a model stores them. zero: z, integers
    in float from 0 to 2^bits - 1, or 2^(bits - 1) where the grid is symmetric.
    """

    bits: int
    scale: Tensor
    zero: Tensor

    @staticmethod
    def of(groups: Tensor, bits: int, symmetric: bool) -> Grid:
        """From the least to the largest entry of each group (..., group) and 0, or equally far to both sides of 0.

        As `compressed-tensors` and the programs that use it lay it.
        """
        steps = 2**bits - 1
        if symmetric:
            scale = 2 * groups.abs().amax(-1) / steps
            return Grid(bits, _as_stored(scale), torch.full_like(scale, 2 ** (bits - 1)))
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = (high - low) / steps
        return Grid(bits, _as_stored(scale), (-low / scale.clamp_min(_TINY)).round().clamp(0, steps))

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest point to each entry (..., one more dimension than the scales), as integers in float."""
        steps = weight / self.scale[..., None].clamp_min(_TINY) + self.zero[..., None]
        return steps.round().clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """The points of these numbers."""
        return (codes - self.zero[..., None]) * self.scale[..., None]


_TINY = 1e-30  # in place of the scale of a group of zeros


def _as_stored(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).to(scale.dtype)


def integer_size(
    shape: tuple[int, int], itemsize: int, keep: float, *, group: int, symmetric: bool, **settings: Any
) -> Size:
    """The most bits that the budget pays for."""
    dense = shape[0] * shape[1] * itemsize
    for bits in reversed(BITS):
        stored = grouped_integer_bytes(*shape, bits, group, symmetric, itemsize)
        if stored <= keep * dense:
            return Size(stored, {"bits": bits})
    raise OutOfReach(
        f"{BITS[0]} bits in groups of {group} store {stored / dense:.4f} of a {shape[0]} x {shape[1]} matrix of "
        f"{itemsize}-byte numbers, scales included, and keep={keep:g} is less; raise it, or take larger groups"
    )


def to_nearest(weight: Tensor, bits: int, group: int, symmetric: bool) -> GroupedInteger:
    """W (d_out x d_in), each entry at the nearest point of its group's grid."""
    groups = grouped(weight, group)
    grid = Grid.of(groups, bits, symmetric)
    codes = grid.codes(groups).flatten(1)[:, : weight.shape[1]]
    return GroupedInteger.from_codes(codes, grid.scale, None if symmetric else grid.zero, bits, group)


def grouped(weight: Tensor, group: int) -> Tensor:
    """W (d_out x d_in) by groups (d_out x groups x group); the last is filled up with the row's last entry."""
    padding = -weight.shape[1] % group
    return torch.cat([weight, weight[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, group))
