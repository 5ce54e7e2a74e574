"""A structure in few bits: whatever a method has made of a matrix, its numbers are rounded afterwards.

`kfac-svd+gptq4` is the method `kfac-svd`, the numbers of its factors and of the matrices that stay dense stored as
integers of 4 bits in groups of 64; `+rtn8`, `+gptq3g32` likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..anatomy import Matrix
from ..errors import OutOfReach
from ..operators import LowRank, Operator
from ..operators.grouped_integer import GroupedInteger, grouped_integer_bytes
from ..operators.monarch import Monarch
from ..operators.quantized import Quantized, wide_side_last
from ..operators.scattered import Leading, ScatteredRows
from ..statistics import InputCovariance, Statistics, key_of
from .frame import put
from .registry import Method, Rounding, method

_FACTORS_ALONE = (LowRank, Monarch, Leading, ScatteredRows)  # but for a position a row, see `stored_share`
_READS = ("right.weight", "inner.weight")  # the factors of these operators that a block's features enter
_SEEN = InputCovariance()


def stored_share(matrices: Sequence[Matrix], chosen: Method) -> float:
    """The most bytes that integers take, over those of the numbers that they stand for, of any matrix or factor.

    A factor's groups lie along a side of its matrix (`Quantized`), or the matrix's rows. What slicing leaves may have a
    position beside each row.
    """
    rounding, shares = chosen.rounding, []
    if rounding is None:
        return 1.0
    beside = 4 if chosen.family == "slicing" else 0
    for matrix in matrices:
        itemsize = matrix.module.weight.element_size()
        for side in matrix.shape:
            stored = grouped_integer_bytes(1, side, rounding.bits, rounding.group, False, itemsize)
            shares.append((stored + beside) / (side * itemsize))
    return max(shares)


def round_matrices(matrices: Sequence[Matrix], chosen: Method, statistics: Statistics | None) -> None:
    """Store what stands in the place of these matrices in few bits, if the method is one that rounds.

    What reads the block's features is rounded by their second moments, where the method has them; the other factors
    (whose inputs are no features) to the nearest.
    """
    rounding = chosen.rounding
    if rounding is None:
        return
    for matrix in matrices:
        module = matrix.module
        seen = None
        if rounding.method.needs:
            assert statistics is not None
            seen = statistics.value(key_of(matrix, _SEEN), _SEEN).to(matrix.weight.double())
        if isinstance(module, (GroupedInteger, Quantized)):
            continue
        if isinstance(module, Operator):
            put(matrix, _round_operator(module, matrix, rounding, seen))
        else:
            put(matrix, _round(matrix.weight, rounding, seen))


def _round_operator(operator: Operator, matrix: Matrix, rounding: Rounding, seen: Tensor | None) -> Quantized:
    if not isinstance(operator, _FACTORS_ALONE):
        raise OutOfReach(
            f"{matrix.name} is stored as {operator.kind!r}, with integers, positions or shared parts beside its "
            "numbers, which are not rounded; low-rank and block-diagonal structures are, and matrices that stay dense"
        )
    factors = {}
    for name, parameter in operator.named_parameters():
        if parameter.dim() > 1:
            factor = wide_side_last(parameter.detach())
            reads = (
                name in _READS and seen is not None and factor.shape == parameter.shape and len(seen) == factor.shape[1]
            )
            factors[name] = _round(factor, rounding, seen if reads else None)
    return Quantized(operator, factors)


def _round(weight: Tensor, rounding: Rounding, seen: Tensor | None) -> GroupedInteger:
    """A matrix, or a factor as it is laid out. seen: second moments of what its columns multiply, if they are known."""
    chosen: Any = rounding.method if seen is not None or not rounding.method.needs else method("rtn")
    moments = [] if not chosen.needs else [seen]
    made = chosen.function(weight.double(), *moments, bits=rounding.bits, group=rounding.group)
    return made.to(weight.dtype)
