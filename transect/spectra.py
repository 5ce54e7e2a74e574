"""The spectrum of a weight matrix: its singular values, and how heavy-tailed their squares are.

Eigenvalues here are those of W Wᵀ, the squared singular values. Those of a random matrix are spread differently for
every ratio of rows to columns, so tail exponents of differently shaped layers cannot be compared. Windows of one aspect
ratio, with all their eigenvalues pooled, can (FARMS, Hu et al., ICML 2025, arXiv:2506.06280).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import TransectError

FLOOR = 1e-5  # eigenvalues below this share of the largest count as zeros, whose logarithm means nothing
SMALLEST_SPECTRUM = 20  # eigenvalues; a power law fitted to fewer says nothing
LARGEST_WINDOW = 2000  # rows; the paper's, for language models
_MOST_CUTS = 500
_SCREEN = 16  # of how many points the first bound on a Kolmogorov-Smirnov distance looks at one
_FEW = 2**16  # distances' points that are not worth a bound
_ENTRIES = 2**22  # numbers in memory at a time
_TOGETHER = 2**28  # entries of the matrices that are decomposed at the same time: 2 GiB in float64
_ROUGH = 1e-12  # share of the largest eigenvalue below which a Gram matrix's eigenvalues are mostly rounding
_Key = TypeVar("_Key")
_LOG_LOW, _LOG_HIGH = torch.tensor([0.95, 1.5], dtype=torch.float64).log().tolist()


def singular_values(weight: Tensor) -> Tensor:
    """The singular values of W (m x n), falling (min(m, n)), float64.

    The square roots of the eigenvalues of the smaller Gram matrix, in float64; so a value of the share s of the largest
    is off by about 1e-15 / s. A matrix that has values below 1e-6 of its largest is decomposed itself instead, at
    several times the cost. Of many matrices take several at a time, see `side_by_side` and `how_many_together`.
    """
    wide = weight.double()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    squares = torch.linalg.eigvalsh(gram).flip(-1)
    return torch.linalg.svdvals(wide) if squares[-1] < _ROUGH * squares[0] else squares.sqrt()


def condition_number(values: Tensor) -> Tensor:
    """σ_max / σ_min of singular values (n), falling, float64; infinite where σ_min is zero to rounding, n ε σ_max."""
    zero = values[-1] <= len(values) * torch.finfo(values.dtype).eps * values[0]
    return torch.where(zero, torch.inf, values[0] / values[-1])


def how_many_together(shapes: Sequence[Sequence[int]]) -> int:
    """How many matrices of these shapes (m, n) may be decomposed at a time without much memory."""
    return max(1, _TOGETHER // max([1, *(shape[0] * shape[1] for shape in shapes)]))


@dataclass(frozen=True)
class PowerLaw:
    """A tail density that falls as λ^-alpha from `start` on; so many eigenvalues are in it.

    distance: the largest difference between its distribution function and the data's (Kolmogorov-Smirnov).
    """

    alpha: float
    start: float
    distance: float
    tail: int


def power_law(eigenvalues: Tensor, floor: float, cuts: int | None = None) -> PowerLaw | None:
    """The power law that fits a tail of the spectrum best (Clauset, Shalizi and Newman, 2009; as in weightwatcher).

    eigenvalues: ascending. Those of at most `floor` are left out: rounding, or zeros. For every start λ_i but the last
    the maximum-likelihood exponent is α = 1 + (N - i) / Σ_{j >= i} ln(λ_j / λ_i), and the start is chosen whose tail is
    nearest to its power law by the Kolmogorov-Smirnov distance. weightwatcher's default, with floor 1e-5, is the same
    fit. cuts: try at most so many starts, evenly spread; by default all, N² / 2 operations at worst (most starts are
    ruled out by looking at every 16th point of the tail, which bounds the distance from below).
    None where fewer than 20 eigenvalues are left, or they are all the same.
    """
    logs = eigenvalues[eigenvalues > floor].double().log()
    if len(logs) < SMALLEST_SPECTRUM or float(logs[-1] - logs[0]) < 1e-9:
        return None
    alphas = _exponents(logs)
    starts = torch.arange(len(logs) - 1, device=logs.device)
    if cuts is not None and len(starts) > cuts:
        starts = starts[torch.linspace(0, len(starts) - 1, cuts).long()]
    if len(starts) * len(logs) <= _FEW:
        distances = _distances(logs, alphas, starts)
        best, chosen = float(distances.min()), int(starts[distances.argmin()])
    else:
        best, chosen = _nearest(logs, alphas, starts)
    return PowerLaw(float(alphas[chosen]), float(logs[chosen].exp()), best, len(logs) - chosen)


def window_starts(size: int, window: int, windows: int) -> list[int]:
    """Where at most `windows` windows of length `window` begin along a side of `size`, spread evenly from 0 on."""
    room = size - window
    step = max(1, room // (windows - 1)) if windows > 1 else max(1, room)
    count = 1 if windows == 1 else min(windows, room // step + 1)
    return [min(index * step, room) for index in range(count)]


def window_shape(shape: tuple[int, int], rows: int, ratio: float) -> tuple[int, int]:
    """(n', m') of a matrix's windows: n' = min(rows, m, n) rows, and floor(n' ratio) columns, from 1 to n.

    A matrix with fewer than `rows` rows or columns gets smaller windows than others, so choose `rows` no larger than
    the smallest side of all matrices that are compared.
    """
    m, n = shape
    height = min(rows, m, n)
    return height, max(1, min(n, int(height * ratio)))


def pooled_eigenvalues(weight: Tensor, rows: int, ratio: float = 1.0, windows: int = 10) -> Tensor:
    """The squared singular values of all windows of W (m x n), ascending (windows² x min(n', m'), or fewer).

    rows, ratio: see `window_shape`; windows: per side. The eigenvalues of the windows' Gram matrices, in the dtype of W
    (use float64: squaring halves the digits of the small ones). One row of windows at a time is in memory.
    """
    height, width = window_shape((weight.shape[0], weight.shape[1]), rows, ratio)
    columns = window_starts(weight.shape[1], width, windows)
    pooled = []
    for top in window_starts(weight.shape[0], height, windows):
        strip = weight[top : top + height]
        tiles = torch.stack([strip[:, left : left + width] for left in columns])  # (windows, n', m')
        gram = tiles @ tiles.mT if height <= width else tiles.mT @ tiles
        pooled.append(torch.linalg.eigvalsh(gram).flatten())
    return torch.cat(pooled).clamp_min(0).sort().values


def hill_median(eigenvalues: Tensor) -> float:
    """The tail exponent α by Hill's estimator over the upper half of the eigenvalues (ascending, N).

    α = 1 + (N - i) / Σ_{j >= i} ln(λ_j / λ_i) with i = floor(N / 2). The density falls as λ^-α. Smaller is heavier.
    """
    logs = _logs(eigenvalues)
    return float(_exponents(logs)[len(logs) // 2])


def hill_peak(eigenvalues: Tensor) -> float:
    """The tail exponent α by Hill's estimator over a tail that begins near the density's peak: noisy.

    x₂ is the left edge of the fullest of 100 bins of log λ. Of all cuts λ_i in [0.95 x₂, 1.5 x₂], the one from which
    the power law fits best, by the Kolmogorov-Smirnov distance max_j |1 - (λ_j / λ_i)^(1-α) - (j - i) / (N - i)|. The
    rule of the paper's pruning experiments; its code takes a logarithm of the lower end alone, which undoes it, and
    ours does not. Of more than 500 cuts, 500 that are evenly spread are tried (our choice: each is a pass over the
    tail).
    """
    logs = _logs(eigenvalues)
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, bins=100, min=low, max=high)
    peak = low + (high - low) * int(counts.argmax()) / 100
    inside = (logs >= peak + _LOG_LOW) & (logs <= peak + _LOG_HIGH)
    candidates = inside.nonzero()[:, 0]
    candidates = candidates[candidates < len(logs) - 1]  # a tail of one eigenvalue has no slope
    if len(candidates) > _MOST_CUTS:
        candidates = candidates[torch.linspace(0, len(candidates) - 1, _MOST_CUTS).long()]
    if len(candidates) == 0:
        return float("nan")
    alphas = _exponents(logs)
    return float(alphas[candidates[_distances(logs, alphas, candidates).argmin()]])


ESTIMATORS = {"hill-median": hill_median, "peak": hill_peak}


def common_window(shapes: Iterable[Sequence[int]]) -> int:
    """Rows of the largest square window that fits into matrices of all these shapes (m, n); at most 2000."""
    return min(LARGEST_WINDOW, *(min(shape) for shape in shapes))


def tail_exponent(weight: Tensor, rows: int, windows: int, estimator: str) -> float:
    """α of W (m x n) by square windows of so many rows; NaN for a matrix of zeros, which has no spectrum.

    windows: per side. estimator: a name in `ESTIMATORS`. TransectError where the spectrum has no tail.
    """
    wide = weight.double()
    return ESTIMATORS[estimator](pooled_eigenvalues(wide, rows, windows=windows)) if wide.any() else math.nan


def stretched(alphas: Mapping[_Key, float], low: float, high: float) -> dict[_Key, float]:
    """The exponents mapped linearly to [low, high]; all 1 where they are all the same."""
    least, most = min(alphas.values()), max(alphas.values())
    if most == least:
        return dict.fromkeys(alphas, 1.0)
    return {key: (alpha - least) / (most - least) * (high - low) + low for key, alpha in alphas.items()}


def _logs(eigenvalues: Tensor) -> Tensor:
    """Logarithms of the eigenvalues (ascending) that are not zero; TransectError where they have no tail."""
    largest = float(eigenvalues[-1])
    positive = eigenvalues[eigenvalues > FLOOR * largest] if largest > 0 else eigenvalues[:0]
    logs = positive.double().log()
    if len(logs) < 4 or float(logs[-1] - logs[len(logs) // 2]) < 1e-9:
        raise TransectError(
            f"a tail exponent needs a spectrum that falls off: of {len(eigenvalues)} eigenvalues {len(logs)} are above "
            f"{FLOOR:g} of the largest, {largest:g}, and the larger half of them is flat"
        )
    return logs


def _exponents(logs: Tensor) -> Tensor:
    """Hill's α for every cut i (N): infinite where the tail is flat."""
    count = torch.arange(len(logs), 0, -1, dtype=logs.dtype, device=logs.device)
    sums = logs.flip(0).cumsum(0).flip(0) - count * logs
    return 1 + count / sums.clamp_min(0)


def _nearest(logs: Tensor, alphas: Tensor, starts: Tensor) -> tuple[float, int]:
    """The smallest distance of all starts, and its start; starts whose lower bound is above it are never looked at."""
    bounds, order = _distances(logs, alphas, starts, _SCREEN).sort()
    best, chosen, step = float("inf"), 0, max(1, min(64, _ENTRIES // len(logs)))
    for first in range(0, len(order), step):
        if float(bounds[first]) >= best:
            break
        part = starts[order[first : first + step]]
        least, where = _distances(logs, alphas, part).min(0)
        if float(least) < best:
            best, chosen = float(least), int(part[where])
    return best, chosen


def _distances(logs: Tensor, alphas: Tensor, cuts: Tensor, stride: int = 1) -> Tensor:
    """max_{j >= i} |1 - (λ_j / λ_i)^(1-α_i) - (j - i) / (N - i)| for every cut i (len(cuts)); 1 where α is infinite.

    stride: look at every so many-th j alone, for a lower bound.
    """
    count = len(logs)
    ranks = torch.arange(0, count, stride, dtype=logs.dtype, device=logs.device)
    seen = logs[::stride]
    found = []
    for part in cuts.split(max(1, _ENTRIES // len(seen))):
        first = int(part.min()) // stride  # no cut of this part looks at anything before
        after = (ranks[first:] - part[:, None]).to(logs.dtype)
        alpha = alphas[part, None]
        model = -torch.expm1((1 - alpha) * (seen[first:] - logs[part, None]))
        apart = (model - after / (count - part[:, None])).abs_()
        found.append(apart.masked_fill_(after < 0, 0).amax(1).masked_fill_(alpha[:, 0].isinf(), 1))
    return torch.cat(found)
