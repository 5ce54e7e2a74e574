"""Running a factorization over a model: factorize every matrix once, then apply any ranks to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..anatomy import Anatomy, Matrix
from ..errors import TransectError
from ..operators import LowRank
from ..statistics import Progress, Statistics, key_of
from .allocation import Ranks, RankTable
from .registry import Method
from .weighted_svd import Factorization


def factorize_matrix(
    matrix: Matrix, method: Method, settings: Mapping[str, Any], statistics: Statistics | None
) -> Factorization:
    """The method's factorization of one matrix: computed in float64 on the matrix's device, kept in float32.

    All singular values are kept, but factors only up to the rank at which they are as large as the matrix.
    """
    weight = matrix.weight.double()
    if not torch.isfinite(weight).all():
        raise TransectError(f"{matrix.name} holds NaN or infinite weights")
    values = []
    for statistic in method.needs:
        assert statistics is not None
        values.append(statistics.value(key_of(matrix, statistic), statistic).to(weight))
    made = method.function(weight, *values, **settings)
    m, n = matrix.shape
    left, right = made.truncate((m * n - 1) // (m + n))  # beyond that rank the dense matrix is smaller
    return Factorization(left.float().contiguous(), made.singular_values, right.float().contiguous())


def factorize(
    matrices: Sequence[Matrix],
    method: Method,
    settings: Mapping[str, Any],
    statistics: Statistics | None,
    progress: Progress | None = None,
) -> dict[str, Factorization]:
    """Factorize every matrix once; the result serves every budget. By matrix name."""
    return {
        matrix.name: factorize_matrix(matrix, method, settings, statistics)
        for matrix in (progress(matrices, method.name) if progress else matrices)
    }


def rank_table(matrix: Matrix, factorization: Factorization) -> RankTable:
    """What the ranks of one matrix cost."""
    itemsize = matrix.module.weight.element_size()
    return RankTable(matrix.name, matrix.block.index, matrix.shape, factorization.losses().cpu(), itemsize)


def low_rank(matrix: Matrix, factorization: Factorization, rank: int) -> LowRank:
    """The rank-r stand-in of a matrix, with its bias, dtype and device."""
    left, right = factorization.truncate(rank)
    like = matrix.module.weight
    return LowRank.from_factors(left.to(like), right.to(like), matrix.bias)


def apply_ranks(matrices: Sequence[Matrix], factors: Mapping[str, Factorization], ranks: Mapping[str, Any]) -> None:
    """Replace every matrix that has a rank by its factors; None and unnamed ones stay dense."""
    for matrix in matrices:
        rank = ranks.get(matrix.name)
        if rank is not None:
            matrix.replace(low_rank(matrix, factors[matrix.name], rank))


@contextmanager
def temporarily(anatomy: Anatomy, matrices: Sequence[Matrix]) -> Iterator[None]:
    """Whatever replaces these matrices inside the `with` is undone at its end, the structure record included."""
    record = anatomy.record
    before = dict(record.modules)
    hosts = {matrix.path: matrix.host for matrix in matrices}
    try:
        yield
    finally:
        for path, host in hosts.items():
            anatomy.model.set_submodule(path, host)
        record.modules = before


def describe_ranks(tables: Sequence[RankTable], ranks: Ranks) -> dict[str, Any]:
    """The outcome of an allocation, for reports and the structure record's history."""
    dense = sum(table.dense_bytes for table in tables)
    kept = sum(table.bytes_at(ranks[table.name]) for table in tables)
    return {"matrix_bytes": kept, "dense_matrix_bytes": dense, "kept": kept / dense}
