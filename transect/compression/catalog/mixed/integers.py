"""Integers as ways to store a matrix, or its low-rank factors: priced at once, rounded only where they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....anatomy import Block, Matrix
from ....operators import LowRank
from ....operators.corrected import Corrected
from ....operators.grouped_integer import BITS, GroupedInteger, grouped_integer_bytes
from ....operators.quantized import Quantized
from ...frame import put
from ...integers import Grid, grouped
from ...two_sided import pivots, round_two_sided
from ...weighted_svd import Factorization, weighted_svd
from .options import Metric, MetricOf, Option, factorized, named

_Factors = tuple[LowRank, dict[str, GroupedInteger]]
GROUP = 64
_FACTOR_BITS = (3, 4, 8)
_RANKS = (2, 4, 8, 16, 32, 64)  # of corrections
_NARROWER = tuple(1 - i / 20 for i in range(11))  # of the grid that reaches every weight


def integer_options(matrix: Matrix, rounding: MetricOf) -> Iterator[Option]:
    """The matrix as integers of each number of bits, rounded by both sides of the metric (`round_two_sided`).

    The price is what is expected: D_i E_j times the mean squared error of rounding to the nearest, over the group. That
    is exact where what is added to an entry is spread evenly over a step.
    rounding: gives the matrix's metric, now and again when the option is taken.

    After each come the same integers with a low-rank correction of what rounding lost, see `correction`, at ranks that
    cost less than the next number of bits.
    """
    metric, weight = rounding(matrix), matrix.weight.float()
    rows, columns = (pivots(each).float() for each in (metric.gradients, metric.inputs))
    a_rank = sum(matrix.shape) * metric.itemsize
    sizes = {bits: grouped_integer_bytes(*matrix.shape, bits, GROUP, False, metric.itemsize) for bits in BITS}
    for bits, larger in zip(BITS, (*BITS[1:], None), strict=True):
        grid = best_grid(weight, metric.inputs.diagonal(), bits)
        errors = _squared_errors(weight, grid)
        loss = float(rows @ errors @ columns)

        @cache
        def made(bits: int = bits) -> GroupedInteger:
            ours = rounding(matrix)
            return rounded(matrix.weight.float(), ours.gradients, ours.inputs, bits)

        def put_integers(block: Block, made: Callable[[], GroupedInteger] = made) -> None:
            put(named(block, matrix.name), made().select(None, None))  # a copy: it may be put in several models

        size = sizes[bits]
        yield Option("integer", (matrix.name,), size, loss, put_integers, size / metric.dense_bytes)
        ranks = [] if larger is None else [rank for rank in _RANKS if size + rank * a_rank < sizes[larger]]
        for rank, left in zip(ranks, correction_leaves(rows, errors, columns, ranks), strict=True):

            @cache
            def corrected(made: Callable[[], GroupedInteger] = made, rank: int = rank) -> Corrected:
                return correction(rounding(matrix), made(), rank)

            def put_corrected(block: Block, corrected: Callable[[], Corrected] = corrected) -> None:
                put(named(block, matrix.name), corrected().select(None, None))

            whole = size + rank * a_rank
            yield Option(
                "corrected", (matrix.name,), whole, loss * left, put_corrected, whole / metric.dense_bytes
            )  # fmt: skip


def correction(metric: Metric, integers: GroupedInteger, rank: int) -> Corrected:
    """The integers with the low-rank correction under which the price is least (LQER and EoRA, by both sides)."""
    lost = metric.matrix.weight.double() - integers.to_dense().detach().double()
    left, right = weighted_svd(lost, metric.gradients, metric.inputs).truncate(rank)
    return Corrected(integers, LowRank.from_factors(left.float(), right.float()))


def correction_leaves(rows: Tensor, errors: Tensor, columns: Tensor, ranks: Sequence[int]) -> list[float]:
    """The shares of the price that are expected to be left after corrections of these ranks.

    rows, columns: D (d_out) and E (d_in), the pivots of both sides. errors: mean squared errors (d_out x d_in).
    In the axes of `round_two_sided` what rounding leaves is as good as independent, with the price D_i E_j a square; a
    correction takes the leading singular components of that, and the shares are those of one such matrix, drawn.
    """
    if not ranks:
        return []
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(errors.shape, generator=generator).to(errors.device).mul_(2).sub_(1)
    drawn *= (rows[:, None] * errors * columns).sqrt()
    gram = drawn @ drawn.T if len(rows) <= len(columns) else drawn.T @ drawn
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    total = energy.sum()
    return [float(energy[rank:].sum() / total) if total > 0 else 1.0 for rank in ranks]


def integer_low_rank_options(
    matrix: Matrix, made: Factorization, shares: Sequence[float], metric_of: MetricOf, rounding: MetricOf
) -> Iterator[Option]:
    """KFAC-SVD (`made`) at ranks of these shares, its factors as integers. metric_of, rounding: metrics for each step.

    In its metric the components of a KFAC-SVD are uncorrelated: LᵀΓL and R A Rᵀ are diagonal. So Lᵀ is rounded by Γ and
    R by A, row by row (GPTQ), and the price of each component is its own.
    """
    (m, n), metric = matrix.shape, rounding(matrix)
    itemsize, dense_bytes = metric.itemsize, metric.dense_bytes
    tails, most = made.losses(), max(1, int(max(shares) * m * n / (m + n)))
    prices = [_factor_prices(made, metric, most, bits).cumsum(0) for bits in _FACTOR_BITS]
    for bits, price in zip(_FACTOR_BITS, prices, strict=True):
        for rank in sorted({int(share * m * n / (m + n)) for share in shares} - {0}):

            @cache
            def factors(bits: int = bits, rank: int = rank) -> _Factors:
                left, right = factorized(metric_of(matrix)).truncate(rank)
                ours = rounding(matrix)
                one = torch.eye(rank, dtype=torch.float64, device=left.device)
                stored = {
                    "left.weight": rounded(left.T.float(), one, ours.gradients, bits),
                    "right.weight": rounded(right.float(), one, ours.inputs, bits),
                }
                return LowRank.from_factors(left.float(), right.float()), stored

            def put_factors(block: Block, factors: Callable[[], _Factors] = factors) -> None:
                plain, stored = factors()
                copies = {name: each.select(None, None) for name, each in stored.items()}
                put(named(block, matrix.name), Quantized(plain.select(None, None), copies))  # type: ignore[arg-type]

            size = sum(grouped_integer_bytes(rank, side, bits, GROUP, False, itemsize) for side in (m, n))
            loss = float(tails[rank] + price[rank - 1])
            yield Option("integer low-rank", (matrix.name,), size, loss, put_factors, size / dense_bytes)


def least_integer_bytes(matrix: Matrix, share: float) -> int:
    """What the smallest of these options stores: the fewest bits of all numbers, or of factors of a rank."""
    (m, n), itemsize = matrix.shape, matrix.module.weight.element_size()
    rank = int(share * m * n / (m + n))
    whole = grouped_integer_bytes(m, n, BITS[0], GROUP, False, itemsize)
    factors = sum(grouped_integer_bytes(rank, side, _FACTOR_BITS[0], GROUP, False, itemsize) for side in (m, n))
    return min(whole, factors) if rank else whole


def rounded(weight: Tensor, gradients: Tensor, inputs: Tensor, bits: int) -> GroupedInteger:
    """W (d_out x d_in) as integers, by both sides of the metric."""
    grid = best_grid(weight, inputs.diagonal(), bits)
    codes = round_two_sided(weight, gradients, inputs, grid, GROUP)
    return GroupedInteger.from_codes(codes, grid.scale, grid.zero, bits, GROUP)


def best_grid(weight: Tensor, strengths: Tensor, bits: int) -> Grid:
    """For each group the grid, of those that reach from the least weight to the largest or not quite so far, with the
    least Σ_j a_j (w_ij - ŵ_ij)² to the nearest points; a_j (d_in) are the columns' strengths, A_jj.
    """
    groups = grouped(weight, GROUP)
    counts = pad(strengths.float(), (0, -len(strengths) % GROUP)).view(1, -1, GROUP)
    best = None
    for share in _NARROWER:
        grid = Grid.of(groups * share, bits, False)
        error = ((grid.values(grid.codes(groups)) - groups).square() * counts).sum(-1)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(bits, torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
    assert best is not None
    return best


def _squared_errors(weight: Tensor, grid: Grid) -> Tensor:
    """The mean squared error of rounding to the nearest in each entry's group (d_out x d_in)."""
    groups = grouped(weight, GROUP)
    errors = (grid.values(grid.codes(groups)) - groups).square().mean(-1, keepdim=True)
    return errors.expand_as(groups).flatten(1)[:, : weight.shape[1]]


def _factor_prices(made: Factorization, metric: Metric, rank: int, bits: int) -> Tensor:
    """What rounding adds to each of the first components' price (rank)."""
    left, right = made.truncate(rank)
    importance = left.T @ metric.gradients, right @ metric.inputs  # Lᵀ Γ, R A
    found = torch.zeros(left.shape[1], dtype=torch.float64, device=left.device)
    sides = (
        (left.T, metric.gradients, (importance[1] * right).sum(1)),
        (right, metric.inputs, (importance[0] * left.T).sum(1)),
    )
    for factor, own, others in sides:
        grid = best_grid(factor.float(), own.diagonal(), bits)
        found += others * (_squared_errors(factor.float(), grid).double() @ pivots(own))
    return found
