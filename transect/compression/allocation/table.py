"""What an allocation decides on: for each matrix, what every rank costs in bytes and in predicted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...anatomy import Matrix
from ...errors import OutOfReach, TransectError
from ..sizes import dense_bytes

# Rank per matrix name; None means that the matrix stays dense.
Ranks = dict[str, int | None]
# Share of its dense bytes that a matrix may keep, per matrix name.
Shares = dict[str, float]


@dataclass(frozen=True)
class Unit:
    """A matrix as a sharing sees it. bytes: of the dense matrix. role: q, k, v, o, gate, up or down."""

    name: str
    block: int
    role: str
    bytes: int

    @staticmethod
    def of(matrix: Matrix) -> Unit:
        """The unit of a dense matrix."""
        return Unit(matrix.name, matrix.block.index, matrix.role, dense_bytes(matrix))


@dataclass(frozen=True)
class RankTable:
    """One matrix W (m x n) with its options: rank 1 to `largest_rank`, or dense.

    losses: (k + 1), the method's objective at rank 0, 1 ... k; dense costs 0. itemsize: bytes of one number.
    """

    name: str
    block: int
    shape: tuple[int, int]
    losses: Tensor
    itemsize: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of W."""
        return self.shape[0] * self.shape[1] * self.itemsize

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that one more rank stores."""
        return (self.shape[0] + self.shape[1]) * self.itemsize

    @property
    def largest_rank(self) -> int:
        """The largest rank that stores less than the dense matrix."""
        return (self.dense_bytes - 1) // self.bytes_per_rank

    def bytes_at(self, rank: int | None) -> int:
        """Bytes at a rank; None is dense."""
        return self.dense_bytes if rank is None else rank * self.bytes_per_rank

    def loss_at(self, rank: int | None) -> float:
        """The objective at a rank; None is dense."""
        return 0.0 if rank is None else float(self.losses[rank])


def total_bytes(tables: Sequence[RankTable], ranks: Ranks) -> int:
    """Bytes of all matrices at these ranks."""
    return sum(table.bytes_at(ranks[table.name]) for table in tables)


_UP = 1 + 1e-12  # what division has rounded down is not lost


def uniform_rank(shape: tuple[int, int], keep: float) -> int:
    """The rank at which r (m + n) numbers are at most `keep` of m n."""
    m, n = shape
    return int(keep * m * n * _UP // (m + n))


def rank_of_share(name: str, shape: tuple[int, int], share: float) -> int | None:
    """The rank that a share of a matrix's bytes pays for; None (dense) for all of them, OutOfReach for less than 1."""
    if share * _UP >= 1:
        return None
    rank = uniform_rank(shape, share)
    if rank < 1:
        m, n = shape
        raise OutOfReach(
            f"keep={share:.4g} leaves no rank for {name} ({m} x {n}): rank 1 needs keep >= {(m + n) / (m * n):.4g}"
        )
    return rank


def check_keep(keep: float) -> None:
    """Raise an error unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise TransectError(f"keep is the share of bytes to keep, above 0 and at most 1; got {keep}")
