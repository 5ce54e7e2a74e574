"""Integer spike counts s, expanded over steps of virtual time without loss, and how sparse they are (Section 3.3).

Steps come first: planes (T x the shape of s), all of the same dtype as s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import TransectError
from ....operators.spiking import Spiking, spike_counts

_SPIKE, _FLOAT16, _INT8 = 0.03, 1.5, 0.23  # picojoules of an addition for a spike, and of multiply-adds (Section 4.4)
_WINDOW = 3  # planes of the window in which sparsity is counted: counts up to 7


def binary_spikes(s: Tensor) -> Tensor:
    """{0, 1}, T = max s: a step fires as long as some of the count is left. TransectError for a negative count."""
    if s.numel() and s.min() < 0:
        raise TransectError("binary spikes code counts that are not negative: take ternary or bitwise ones")
    return ternary_spikes(s)


def ternary_spikes(s: Tensor) -> Tensor:
    """{-1, 0, 1}, T = max |s|: as many steps as the count fire with its sign. The sum of the steps is s."""
    steps = torch.arange(_largest(s), device=s.device).view(-1, *[1] * s.dim())
    return (s.abs() > steps) * s.sign()


def planes_needed(s: Tensor) -> int:
    """How many bits |s| has at most; at least 1."""
    return max(1, _largest(s).bit_length())


def _largest(s: Tensor) -> int:
    """The largest |s|. TransectError where one is not finite."""
    largest = float(s.abs().max())
    if not math.isfinite(largest):
        raise TransectError("what is not finite has no count of spikes: look for where the model overflows")
    return int(largest)


def bitwise_planes(s: Tensor, planes: int | None = None) -> Tensor:
    """Sign times bit, the highest first: T of them, default as many as needed. s is Σ 2^(T - 1 - t) plane_t."""
    return _bits(s.abs(), planes_needed(s) if planes is None else planes) * s.sign()


def from_planes(planes: Tensor) -> Tensor:
    """s of its bitwise planes, or of what a linear map makes of each of them."""
    weights = 2 ** torch.arange(len(planes) - 1, -1, -1, device=planes.device)
    return (weights.view(-1, *[1] * (planes.dim() - 1)).to(planes.dtype) * planes).sum(0)


def complement_planes(s: Tensor) -> Tensor:
    """Two's complement: T + 1 planes of {0, 1}, of which the first says that s is negative."""
    planes = planes_needed(s) + 1
    return _bits(torch.where(s < 0, s + 2**planes, s), planes)


def from_complement(planes: Tensor) -> Tensor:
    """s of its planes in two's complement."""
    return from_planes(planes) - 2 ** len(planes) * planes[0]


def _bits(s: Tensor, planes: int) -> Tensor:
    shifts = torch.arange(planes - 1, -1, -1, device=s.device).view(-1, *[1] * s.dim())
    return ((s.long() >> shifts) & 1).to(s.dtype)


@dataclass
class Counted:
    """Sums over spike counts. spikes: set bits of all; small: counts of at most 7; within: set bits of those."""

    numbers: int = 0
    zeros: int = 0
    spikes: int = 0
    small: int = 0
    within: int = 0

    def add(self, s: Tensor) -> None:
        """Count these too."""
        bits = _bits(s.abs(), planes_needed(s)).sum(0)
        small = s.abs() < 2**_WINDOW
        self.numbers += s.numel()
        self.zeros += int((s == 0).sum())
        self.spikes += int(bits.sum())
        self.small += int(small.sum())
        self.within += int(bits[small].sum())

    def told(self) -> dict[str, float]:
        """What a user is told; energies are idealized counts of arithmetic, and nothing that was measured.

        Sparsity is the share of empty places in the three planes of those counts that fit into them (which counts the
        report leaves out is not said; ours).
        """
        spikes = self.spikes / self.numbers
        energy = _SPIKE * spikes
        return {
            "share of inputs without a spike": self.zeros / self.numbers,
            "share of counts of at most 7": self.small / self.numbers,
            "spikes of an input (set bits)": spikes,
            "sparsity of three planes": 1 - self.within / (_WINDOW * max(1, self.small)),
            "idealized pJ of an input": energy,
            "idealized share of float16's energy": energy / _FLOAT16,
            "idealized share of int8's energy": energy / _INT8,
        }


@contextmanager
def counting(spiking: Iterable[Spiking]) -> Iterator[Counted]:
    """Inside the `with`, everything that these read is counted, padding included."""
    counted = Counted()

    def hook(module: Any, given: tuple[Tensor, ...]) -> None:
        counted.add(spike_counts(given[0], module.k)[0])

    handles = [one.register_forward_pre_hook(hook) for one in spiking]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()
