"""Compressing one block: what a recipe comes down to, whichever way the blocks and their statistics come.

All blocks from one pass (`compress`), each on the outputs of the compressed ones before it (`sequential`), or one at a
time from disk (`transect.streaming`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..anatomy import Anatomy, Block, Matrix
from ..errors import NotApplicable, OutOfReach
from ..statistics import Statistics
from .allocation import Ranks, Shares, Unit
from .factorized import ranks_of_shares
from .frame import apply_ranks, check_finite, factorize_matrix, replace_matrix
from .registry import Method, Size
from .rounding import round_matrices
from .weighted_svd import Factorization


class Compressor(Protocol):
    """What a recipe comes down to for one block."""

    def __call__(self, block: Block, matrices: Sequence[Matrix], statistics: Statistics | None) -> None:
        """Compress these matrices of a block, in place. statistics: what the method needs of them.

        Raises TransectError where NaN or infinite numbers come out.
        """
        ...


@dataclass(frozen=True)
class RankCompressor:
    """factors: if given, they are truncated; otherwise each matrix is factorized when its block comes."""

    method: Method
    settings: Mapping[str, Any]
    ranks: Ranks
    factors: Mapping[str, Factorization] | None = None

    def __call__(self, block: Block, matrices: Sequence[Matrix], statistics: Statistics | None) -> None:
        made = self.factors
        if made is None:
            made = {
                matrix.name: factorize_matrix(matrix, self.method, self.settings, statistics)
                for matrix in matrices
                if self.ranks[matrix.name] is not None
            }
        apply_ranks(matrices, made, self.ranks)
        round_matrices(matrices, self.method, statistics)
        check_finite(matrices, self.method)


@dataclass(frozen=True)
class SizeCompressor:
    """sizes: of each matrix's replacement; None stays dense."""

    method: Method
    settings: Mapping[str, Any]
    sizes: Mapping[str, Size | None]

    def __call__(self, block: Block, matrices: Sequence[Matrix], statistics: Statistics | None) -> None:
        for matrix in matrices:
            size = self.sizes[matrix.name]
            if size is not None:
                replace_matrix(matrix, self.method, self.settings, size, statistics)
        round_matrices(matrices, self.method, statistics)
        check_finite(matrices, self.method)


@dataclass(frozen=True)
class SliceCompressor:
    """shares: of the bytes of each block's matrices, by block index."""

    method: Method
    settings: Mapping[str, Any]
    shares: Mapping[int, float]

    def __call__(self, block: Block, matrices: Sequence[Matrix], statistics: Statistics | None) -> None:
        share = self.shares.get(block.index, 1.0)  # a block whose sublayers are all gone has none
        if share < 1:
            self.method.function(block, statistics, share, **self.settings)
        rounding = self.method.rounding
        if rounding is not None and not rounding.method.needs:  # others go by the inputs that are left, see `compress`
            round_matrices(block.matrices(), self.method, None)
        if share < 1 or rounding is not None:
            check_finite(matrices, self.method)


@dataclass(frozen=True)
class ChoiceCompressor:
    """numbers: of the options that are taken in each block, by its index; see `ByBlock`."""

    method: Method
    settings: Mapping[str, Any]
    numbers: Mapping[int, Sequence[int]]

    def __call__(self, block: Block, matrices: Sequence[Matrix], statistics: Statistics | None) -> None:
        assert self.method.by_block is not None
        options = self.method.by_block.options(block, statistics, **self.settings)
        for number in self.numbers[block.index]:
            options[number].put(block)
        round_matrices(block.matrices(), self.method, statistics)
        check_finite(block.matrices(), self.method)


def compressor_of(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    method: Method,
    settings: Mapping[str, Any],
    shares: Shares,
    allocation: str = "uniform",
) -> Compressor:
    """What compresses each block so that every matrix keeps its share; OutOfReach where the method cannot.

    allocation: where the shares are from, for the message.
    """
    try:
        return _compressor_of(anatomy, matrices, method, settings, shares)
    except OutOfReach as error:
        if allocation == "uniform":
            raise
        raise OutOfReach(
            f"{error}. These are shares of {allocation} allocation; uniform ones, or others of its settings, may do"
        ) from None


def _compressor_of(
    anatomy: Anatomy, matrices: Sequence[Matrix], method: Method, settings: Mapping[str, Any], shares: Shares
) -> Compressor:
    if method.family == "factorization":
        return RankCompressor(method, settings, ranks_of_shares(matrices, shares))
    if method.family == "replacement":
        return SizeCompressor(method, settings, sizes_of_shares(matrices, method, settings, shares))
    of_blocks = block_shares(matrices, shares)
    for block in anatomy.blocks:
        if of_blocks.get(block.index, 1.0) < 1:
            assert method.plan is not None
            with out_of_reach(method):
                method.plan(block, of_blocks[block.index], **settings)
    return SliceCompressor(method, settings, of_blocks)


@contextmanager
def out_of_reach(method: Method) -> Iterator[None]:
    """A structure that a method does not know, such as a mixture of experts, puts every budget out of its reach."""
    try:
        yield
    except NotApplicable as reason:
        raise OutOfReach(f"{method.name} cannot be applied: {reason}") from None


def block_shares(matrices: Sequence[Matrix], shares: Shares) -> dict[int, float]:
    """The share of each block's bytes."""
    kept: dict[int, float] = {}
    whole: dict[int, float] = {}
    for unit in map(Unit.of, matrices):
        kept[unit.block] = kept.get(unit.block, 0.0) + shares[unit.name] * unit.bytes
        whole[unit.block] = whole.get(unit.block, 0.0) + unit.bytes
    return {block: kept[block] / whole[block] for block in kept}


def sizes_of_shares(
    matrices: Sequence[Matrix], method: Method, settings: Mapping[str, Any], shares: Shares
) -> dict[str, Size | None]:
    """The size that each matrix's share pays for.

    What sizes leave over is saved up, from the first matrix to the last, until it pays for leaving one dense. So a
    method of one size only (2:4) spends a larger budget on dense matrices, spread evenly over the model.
    """
    assert method.plan is not None
    sizes: dict[str, Size | None] = {}
    saved = 0.0
    for matrix, unit in zip(matrices, map(Unit.of, matrices), strict=True):
        share = shares[matrix.name]
        itemsize = matrix.module.weight.element_size()
        if share == 1:
            sizes[matrix.name] = None
            continue
        try:
            size = method.plan(matrix.shape, itemsize, share, **settings)
        except OutOfReach as error:
            raise OutOfReach(f"{matrix.name}: {error}") from None
        saved += share * unit.bytes - size.bytes
        stays = not method.even and saved >= unit.bytes - size.bytes
        sizes[matrix.name] = None if stays else size
        saved -= unit.bytes - size.bytes if stays else 0
    return sizes
