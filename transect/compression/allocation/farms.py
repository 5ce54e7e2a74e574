"""FARMS: blocks whose weights look less trained keep fewer bytes (Hu et al., ICML 2025, arXiv:2506.06280)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from ...anatomy import Matrix
from ...errors import TransectError
from ...spectra import common_window, stretched, tail_exponent
from ...statistics import Statistics
from ..registry import Range
from .registry import sharing
from .table import Shares, Unit

_LARGEST_REMOVAL = 0.998  # a block's share of bytes that may go; the paper clamps what is above 1 to this


def score(
    matrix: Matrix,
    statistics: Statistics | None,
    *,
    epsilon: float,
    window: int,
    windows: int,
    estimator: str,
) -> float:
    """The tail exponent α of a matrix's spectrum, by square windows of one size over the whole model.

    NaN for a matrix of zeros, such as a depth-expanded model's new blocks have: it has no spectrum.
    """
    rows = window or common_window(other.shape for other in matrix.block.anatomy.matrices())
    try:
        return tail_exponent(matrix.weight, rows, windows, estimator)
    except TransectError as error:
        raise TransectError(f"farms cannot score {matrix.name}: {error}; use another allocation") from None


@sharing("farms", paper="arXiv:2506.06280", score=score)
def farms(
    units: Sequence[Unit],
    keep: float,
    scores: Mapping[str, float],
    *,
    epsilon: Annotated[float, Range(0, 0.9)] = 0.2,
    window: Annotated[int, Range(0, 100_000)] = 0,
    windows: Annotated[int, Range(1, 100)] = 10,
    estimator: Literal["hill-median", "peak"] = "hill-median",
) -> Shares:
    """Remove more from blocks whose weights have a light-tailed spectrum, which reads as less trained.

    With a_b the mean tail exponent over the matrices of block b (but those of zeros; a block of zeros alone counts like
    the mean of the others), scaled to t_b in [1 - ε, 1 + ε], and p_b its bytes,
    block b loses the share S t_b Σp / Σ(p t) of its bytes, where S = 1 - keep; all its matrices lose the same. A block
    never loses more than 0.998, and what that leaves over is taken from the others in proportion to t (the paper leaves
    it untaken). The exponents come from windows of one shape, since a spectrum's depends on the matrix's. Eigenvalues
    below 1e-5 of the largest count as zeros, which have no logarithm (our floor; the authors' code has an absolute one,
    and does not use it by default). They use the weights alone: no data, whatever the method.

    epsilon: how far the shares may differ: the largest removal is (1 + epsilon) / (1 - epsilon) times the smallest.
        The authors tune it per model and method, on text that must not be the evaluation's.
    window: rows (and columns) of a window; 0 is the smallest side of all the model's matrices, at most 2000. A matrix
        with a smaller side gets smaller windows, whose exponents are less comparable.
    windows: windows along each side of a matrix, overlapping where they must. Costs windows² eigenvalue problems.
    estimator: where the tail begins: at the median eigenvalue, our default, or where a power law fits best near the
        density's peak (the paper's for pruning, but noisy).
    """
    blocks: dict[int, list[Unit]] = {}
    for unit in units:
        blocks.setdefault(unit.block, []).append(unit)
    alphas = mean_exponents({block: [scores[unit.name] for unit in mine] for block, mine in blocks.items()})
    sizes = {block: sum(unit.bytes for unit in mine) for block, mine in blocks.items()}
    removed = removals(sizes, stretched(alphas, 1 - epsilon, 1 + epsilon), 1 - keep)
    # Rounding must not carry the total above the budget.
    return {unit.name: (1 - removed[unit.block]) * (1 - 1e-12) for unit in units}


def mean_exponents(exponents: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The mean of each block's exponents that are there; where there is none, that of the other blocks' means."""
    known = {block: [alpha for alpha in mine if not math.isnan(alpha)] for block, mine in exponents.items()}
    means = {block: sum(mine) / len(mine) for block, mine in known.items() if mine}
    middle = sum(means.values()) / len(means) if means else 1.0
    return {block: means.get(block, middle) for block in exponents}


def removals(sizes: Mapping[int, int], weights: Mapping[int, float], total: float) -> dict[int, float]:
    """Shares of the blocks' bytes to remove, in proportion to the weights, none above the largest that is allowed.

    Σ sizes · removal = total · Σ sizes, also where some are held at the limit.
    """
    limit = max(_LARGEST_REMOVAL, total)
    removed: dict[int, float] = {}
    free = set(sizes)
    while free:  # each round holds a block at the limit, or is the last
        left = total * sum(sizes.values()) - sum(sizes[block] * removed[block] for block in removed)
        factor = left / sum(sizes[block] * weights[block] for block in free)
        over = {block for block in free if factor * weights[block] > limit}
        removed |= {block: limit if block in over else factor * weights[block] for block in (over or free)}
        free -= over or free
    return removed
