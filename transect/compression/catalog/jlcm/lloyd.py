"""K-means of numbers: codes that leave the least squared error, by Lloyd's steps."""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 100
_CELLS = 1024  # of equally many values, from which their density is told


def lloyd(values: Tensor, importance: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Codes (count), ascending, and the index of the nearest to each value (values' shape).

    They minimise sum importance (value - code)² locally: the better of what two starts lead to. A code that no value
    has moves to the value with the largest error. Values of no more than `count` different numbers are met exactly.
    importance: of each value; None for 1.

    The values are sorted once. A cell is then a range, and its mean a difference of running sums.
    """
    line, order = values.flatten().sort()
    distinct = line.unique_consecutive()
    if len(distinct) <= count:
        codes = torch.cat([distinct, distinct[-1:].expand(count - len(distinct))])
    else:
        weight = torch.ones_like(line) if importance is None else importance.expand_as(values).flatten()[order]
        sums = _running(weight), _running(weight * line)
        found = [_lowered(line, weight, *sums, start) for start in (quantiles(line, count), companded(line, count))]
        codes = max(found, key=lambda codes: _explained(line, *sums, codes))
    places = torch.arange(count, device=line.device).repeat_interleave(_counts(cell_ends(line, codes)))
    return codes, torch.empty_like(order).scatter_(0, order, places).view_as(values)


def quantiles(line: Tensor, count: int) -> Tensor:
    """Evenly spaced ones of the ascending values; of the different ones where a value takes several."""
    middles = ((torch.arange(count, device=line.device) + 0.5) / count).double()
    codes = line[(middles * len(line)).long()]
    if (codes.diff() > 0).all():
        return codes
    distinct = line.unique_consecutive()
    return distinct[(middles * len(distinct)).long()]


def companded(line: Tensor, count: int) -> Tensor:
    """As dense as the cube root of the values' density, the best of many codes (Panter and Dite, 1951).

    From quantiles, of which the middle has far too many, 256 codes end at several times the error.
    """
    cells = min(_CELLS, len(line) - 1)
    ends = line[torch.linspace(0, len(line) - 1, cells + 1, dtype=torch.float64).long().to(line.device)].double()
    share = _running(ends.diff() ** (2 / 3))  # a cell of width w has density 1 / w, and its codes w (1 / w)^(1/3)
    wanted = (torch.arange(count, device=line.device) + 0.5) / count * share[-1]
    cell = torch.searchsorted(share, wanted, right=True).clamp(1, cells)
    inside = (wanted - share[cell - 1]) / (share[cell] - share[cell - 1])
    return (ends[cell - 1] + inside * (ends[cell] - ends[cell - 1])).to(line)


def _running(numbers: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2 ... numbers, float64."""
    return torch.cat([numbers.new_zeros(1, dtype=torch.float64), numbers.double().cumsum(0)])


def _lowered(line: Tensor, weight: Tensor, mass: Tensor, moment: Tensor, codes: Tensor) -> Tensor:
    """Codes after Lloyd's steps, until they stay."""
    for _ in range(_ITERATIONS):
        moved = step(line, weight, mass, moment, codes)
        if torch.equal(moved, codes):
            break
        codes = moved
    return codes


def _explained(line: Tensor, mass: Tensor, moment: Tensor, codes: Tensor) -> float:
    """Sum importance value², less the error that the codes leave."""
    held, total = (_counts(sums[cell_ends(line, codes)]) for sums in (mass, moment))
    return float((codes.double() * (2 * total - codes * held)).sum())


def _counts(ends: Tensor) -> Tensor:
    """How many are in each cell, or how much, from where cells end."""
    return ends.diff(prepend=ends.new_zeros(1))


def step(line: Tensor, weight: Tensor, mass: Tensor, moment: Tensor, codes: Tensor) -> Tensor:
    """Each code becomes the mean of the values nearest to it; one that has none, the value with the largest error.

    line: the values, ascending, with their weight. mass, moment: running sums of the weight and of weight x value.
    """
    ends = cell_ends(line, codes)
    held, total = _counts(mass[ends]), _counts(moment[ends])
    moved = torch.where(held > 0, (total / held.clamp_min(torch.finfo(held.dtype).tiny)).to(codes), codes)
    empty = (_counts(ends) == 0).nonzero()[:1, 0]  # one a step: the errors are others then
    if len(empty):
        worst = ((line - moved.repeat_interleave(_counts(ends))).square() * weight).argmax()
        moved = moved.index_copy(0, empty, line[worst][None])
    return moved.sort().values


def cell_ends(line: Tensor, codes: Tensor) -> Tensor:
    """How many of the ascending values are nearest to one of the first 1, 2 ... codes."""
    middles = (codes[1:] + codes[:-1]) / 2
    return torch.cat([torch.searchsorted(line, middles, right=True), torch.tensor([len(line)], device=line.device)])
