"""Running a method on single matrices: factorize or replace one, put the result in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..anatomy.finite import all_finite
from ..errors import TransectError
from ..operators import LowRank, Operator
from ..statistics import Progress, Statistics, key_of
from .allocation import RankTable
from .registry import Method, Size
from .weighted_svd import Factorization


def _arguments(matrix: Matrix, method: Method, statistics: Statistics | None) -> list[Tensor]:
    """What a method of one matrix is given: W (d_out x d_in) and the statistics that it needs, in float64."""
    weight = matrix.weight.double()
    if not all_finite(weight):
        raise TransectError(f"{matrix.name} holds NaN or infinite weights")
    values = []
    for statistic in method.needs:
        assert statistics is not None
        values.append(statistics.value(key_of(matrix, statistic), statistic).to(weight))
    return [weight, *values]


def _run(matrix: Matrix, method: Method, settings: Mapping[str, Any], statistics: Statistics | None) -> Any:
    """What a method of one matrix makes of it; an error names the matrix."""
    try:
        return method.function(*_arguments(matrix, method, statistics), **settings)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise TransectError(f"{method.name} cannot decompose {matrix.name}: {error}") from None


def check_finite(matrices: Iterable[Matrix], method: Method) -> None:
    """Raise an error where what a method has made of the matrices holds NaN or infinite numbers."""
    for matrix in matrices:
        module = matrix.module
        _refuse_not_finite([*module.parameters(), *module.buffers()], matrix, method)


def _refuse_not_finite(tensors: Iterable[Tensor], matrix: Matrix, method: Method) -> None:
    if not all(map(all_finite, tensors)):
        raise TransectError(
            f"{method.name} makes NaN or infinite numbers of {matrix.name}, so nothing was changed: its numbers may be "
            "too large for the model's dtype, or its statistics too extreme; try a wider dtype, other settings of the "
            "method, or other calibration data"
        )


def factorize_matrix(
    matrix: Matrix, method: Method, settings: Mapping[str, Any], statistics: Statistics | None
) -> Factorization:
    """The method's factorization of one matrix: computed in float64 on the matrix's device, kept in float32.

    All singular values are kept, but factors only up to the rank at which they are as large as the matrix.
    """
    made = _run(matrix, method, settings, statistics)
    m, n = matrix.shape
    left, right = made.truncate((m * n - 1) // (m + n))  # beyond that rank the dense matrix is smaller
    made = Factorization(left.float().contiguous(), made.singular_values, right.float().contiguous())
    _refuse_not_finite((made.left, made.singular_values, made.right), matrix, method)
    return made


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


def replace_matrix(
    matrix: Matrix, method: Method, settings: Mapping[str, Any], size: Size, statistics: Statistics | None
) -> None:
    """Put a replacement method's operator of that size in the matrix's place."""
    put(matrix, _run(matrix, method, {**size.chosen, **settings}, statistics))


def put(matrix: Matrix, operator: Operator) -> None:
    """Put an operator, made in any precision, in a matrix's place: with its bias, dtype and device."""
    like, bias = matrix.module.weight, matrix.bias
    operator = operator.to(device=like.device, dtype=like.dtype)
    operator.set_bias(bias)
    matrix.replace(operator.requires_grad_(like.requires_grad))


@contextmanager
def temporarily(anatomy: Anatomy, matrices: Sequence[Matrix]) -> Iterator[None]:
    """Whatever replaces these matrices inside the `with` is undone at its end, the structure record included."""
    record = anatomy.record
    before = dict(record.modules)
    hosts = {matrix.path: matrix.host for matrix in matrices}
    owners = [module for module in anatomy.model.modules() if getattr(module, "owns_bank", False)]
    try:
        yield
    finally:
        for path, host in hosts.items():
            anatomy.model.set_submodule(path, host)
        for module in anatomy.model.modules():
            if getattr(module, "owns_bank", False) and not any(module is owner for owner in owners):
                module.disown_bank()
        record.modules.clear()
        record.modules.update(before)
