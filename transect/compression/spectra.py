"""How heavy-tailed a matrix's spectrum is, whatever its shape (FARMS, Hu et al., ICML 2025, arXiv:2506.06280).

The squared singular values of a random matrix are spread differently for every ratio of rows to columns, so tail
exponents of differently shaped layers cannot be compared. Windows of one aspect ratio, with all their eigenvalues
pooled, can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TransectError

FLOOR = 1e-5  # eigenvalues below this share of the largest count as zeros, whose logarithm means nothing
_MOST_CUTS = 500
_LOG_LOW, _LOG_HIGH = torch.tensor([0.95, 1.5], dtype=torch.float64).log().tolist()


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
    alphas = _exponents(logs)
    best, chosen = float("inf"), float("nan")
    for cut in candidates.tolist():
        tail = logs[cut:] - logs[cut]
        share = torch.arange(len(tail), dtype=logs.dtype, device=logs.device) / len(tail)
        distance = float((1 - torch.exp((1 - alphas[cut]) * tail) - share).abs().max())
        if distance < best:
            best, chosen = distance, float(alphas[cut])
    return chosen


ESTIMATORS = {"hill-median": hill_median, "peak": hill_peak}


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
