"""What an allocation decides on: for each matrix, what every rank costs in bytes and in predicted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...errors import TransectError

# Rank per matrix name; None means that the matrix stays dense.
Ranks = dict[str, int | None]


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
        return self.shape[0] * self.shape[1] * self.itemsize

    @property
    def bytes_per_rank(self) -> int:
        return (self.shape[0] + self.shape[1]) * self.itemsize

    @property
    def largest_rank(self) -> int:
        """The largest rank that stores less than the dense matrix."""
        return (self.dense_bytes - 1) // self.bytes_per_rank

    def bytes_at(self, rank: int | None) -> int:
        return self.dense_bytes if rank is None else rank * self.bytes_per_rank

    def loss_at(self, rank: int | None) -> float:
        return 0.0 if rank is None else float(self.losses[rank])


def total_bytes(tables: Sequence[RankTable], ranks: Ranks) -> int:
    """Bytes of all matrices at these ranks."""
    return sum(table.bytes_at(ranks[table.name]) for table in tables)


def uniform_rank(shape: tuple[int, int], keep: float) -> int:
    """The rank at which r (m + n) numbers are at most `keep` of m n."""
    m, n = shape
    return int(keep * m * n * (1 + 1e-12) // (m + n))


def check_keep(keep: float, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise an error unless 0 < keep <= 1 and every matrix can get a rank of at least 1 from it."""
    if not 0 < keep <= 1:
        raise TransectError(f"keep is the share of bytes to keep, above 0 and at most 1; got {keep}")
    for name, shape in shapes.items():
        if uniform_rank(shape, keep) < 1:
            m, n = shape
            raise TransectError(
                f"keep={keep} leaves no rank for {name} ({m} x {n}): rank 1 needs keep >= {(m + n) / (m * n):.4g}"
            )
