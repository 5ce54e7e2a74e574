"""LEMS: layer-wise error models and an integer program (Thoma et al., ICML 2026, OpenReview IjIgNPFuCt)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, vstack

from ...errors import TransectError
from ..registry import Range
from .registry import Measure, ranking
from .table import Ranks, RankTable

_MODELLED_RATIO = 0.1  # the one ratio at which each matrix's divergence is measured


@ranking("ilp", paper="openreview:IjIgNPFuCt", measures=True)
def ilp(
    tables: Sequence[RankTable],
    keep: float,
    measure: Measure,
    *,
    trials: Annotated[int, Range(1, 1000)] = 10,
    rank_multiple: Annotated[int, Range(1, 1024)] = 8,
    predictions: Annotated[int, Range(1, 100_000)] = 500,
) -> Ranks:
    """Model each matrix's effect on the model's output, and solve for the ranks that minimise the modelled total.

    With r_eq = floor(m n / (m + n)) and r0 = floor(0.1 r_eq): the divergence of the model with only matrix l at rank
    r0, K_l, scales the matrix's whitened energy curve e_l(r) = (1 - E_l(r)) / (1 - E_l(r0)); block b weighs
    w_b = 1 + γ h(b), h falling from 1 at the first block to 0 at the last with steepness α. The ranks minimise
    Σ w_b K_l e_l(r_l) within the bytes. Each trial draws α in [0, 3] and γ in [0, 7], solves, and measures the
    assembled model; the best one wins. The authors draw with optuna's TPE, whose first ten trials are random draws;
    ours are random draws with a fixed seed, of which the first is γ = 0.

    trials: how many (α, γ) are tried; each runs the compressed model over the search sequences once.
    rank_multiple: ranks offered are multiples of it, where the matrix is large enough to leave a choice.
    predictions: each K_l is the mean over the first search sequences that have so many compared predictions together
        (ours; LEMS takes all 32 sequences, which 4096 is). Measuring the matrices one by one is most of the time. On
        SmolLM2 K_l spans four orders of magnitude and differs by about 35 % from one sequence of 256 tokens to the
        next; ranks from four of them, which 500 is, cost 2 to 4 % more modelled divergence than K_l without that noise,
        from eight of them half of that.
    """
    options = [_options(table, keep, rank_multiple) for table in tables]
    curves, references = [], {}
    for table, ranks in zip(tables, options, strict=True):
        reference = max(1, int(_MODELLED_RATIO * _equal_rank(table)))
        total = max(float(table.losses[0]), 1e-300)
        at_reference = max(float(table.losses[reference]) / total, 1e-6)
        curves.append(np.array([table.loss_at(rank) / total / at_reference for rank in ranks]))
        references[table.name] = reference
    scales = measure.of_each(references, predictions)
    blocks = max(table.block for table in tables) + 1
    draw = random.Random(42)
    best: tuple[float, Ranks] | None = None
    for trial in range(trials):
        alpha, gamma = (0.0, 0.0) if trial == 0 else (draw.uniform(0, 3), draw.uniform(0, 7))
        weights = depth_weights(blocks, alpha, gamma)
        costs = [weights[table.block] * scales[table.name] * curve for table, curve in zip(tables, curves, strict=True)]
        ranks = solve(tables, options, costs, keep)
        score = measure(ranks)
        if best is None or score < best[0]:
            best = score, ranks
    assert best is not None
    return best[1]


def depth_weights(blocks: int, alpha: float, gamma: float) -> np.ndarray:
    """w_b (blocks): 1 + γ at the first block, 1 at the last; h(b) = Σ_{k >= b} (k + 1)^-α, normalised between them."""
    h = np.cumsum((np.arange(blocks) + 1.0)[::-1] ** -alpha)[::-1]
    return 1 + gamma * (h - h[-1]) / max(h[0] - h[-1], 1e-12)


def solve(
    tables: Sequence[RankTable], options: Sequence[list[int | None]], costs: Sequence[np.ndarray], keep: float
) -> Ranks:
    """One option per matrix with the least total cost within the budget: a multiple-choice knapsack, by HiGHS."""
    sizes = np.concatenate(
        [[table.bytes_at(rank) for rank in ranks] for table, ranks in zip(tables, options, strict=True)]
    ).astype(float)
    dense = float(sum(table.dense_bytes for table in tables))
    cost = np.concatenate(costs)
    one_each = csr_array(block_diag([np.ones((1, len(ranks))) for ranks in options]))
    lower = np.concatenate([np.ones(len(tables)), [0]])
    upper = np.concatenate([np.ones(len(tables)), [keep]])
    result = milp(
        cost / max(cost.max(), 1e-300),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack([one_each, csr_array(sizes[None] / dense)]), lower, upper),  # type: ignore
        options={"time_limit": 60, "mip_rel_gap": 1e-4},
    )
    if result.x is None:
        raise TransectError(f"no choice of ranks keeps {keep} of the bytes: {result.message}")
    chosen, start = {}, 0
    for table, ranks in zip(tables, options, strict=True):
        chosen[table.name] = ranks[int(np.argmax(result.x[start : start + len(ranks)]))]
        start += len(ranks)
    return chosen


def _equal_rank(table: RankTable) -> int:
    m, n = table.shape
    return m * n // (m + n)


def _options(table: RankTable, keep: float, rank_multiple: int) -> list[int | None]:
    """Dense, and ranks from 0.3 (0.1 for keep < 0.5) to 0.95 of r_eq; small matrices get finer steps."""
    equal = _equal_rank(table)
    step = rank_multiple if equal >= 10 * rank_multiple else max(1, equal // 10)
    low, high = (0.3 if keep >= 0.5 else _MODELLED_RATIO) * equal, 0.95 * equal
    low = min(low, keep * equal)  # a budget below every option would have no solution
    ranks = [rank for rank in range(step, table.largest_rank + 1, step) if low <= rank < high]
    return [None, *(ranks or [max(1, int(low))])]
