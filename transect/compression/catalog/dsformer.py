"""DSFormer: dense-sparse factorization of every matrix (Chand, Prabhu and Kumar, 2023, arXiv:2312.13211)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ...layers.dense_sparse import Start, column_blocks, fitting, project, starting_bases
from ...operators.dense_sparse import DenseSparse
from ..registry import Range, Seed, Size, replacement


def dsformer_size(
    shape: tuple[int, int], itemsize: int, keep: float, *, width: int, ratio: float, **settings: object
) -> Size:
    """The most non-zeros s a row and block that `keep` pays for; see `fitting`."""
    return Size(*fitting(shape, itemsize, keep, width, ratio))


@replacement("dsformer", paper="arXiv:2312.13211", size=dsformer_size, refit=True)
def dsformer(
    weight: Tensor,
    *,
    blocks: int,
    bases: int,
    nonzeros: int,
    width: Annotated[int, Range(1, 65_536)] = 64,
    ratio: Annotated[float, Range(1, 64)] = 4.0,
    start: Start = "svd",
    iterations: Annotated[int, Range(1, 10_000)] = 20,
    seed: Seed = 0,
) -> DenseSparse:
    """Build each block of columns from a few dense bases, of which every row combines a fixed number.

    W_β ≈ S_β D_β with D_β (k x c) dense and S_β (d_out x k) of s non-zeros in every row; the form is the paper's. The
    rest is our design, since only the abstract was available: blocks of columns with bases of their own, the error
    ||W_β - S_β D_β||² lowered by OMP and least squares in turn, and the best round of each block kept. It uses no data.
    The paper's training begins there and learns the factors for the loss; its claims are about models so trained.
    Stored: D, the non-zeros, and one bit a row for each basis, at these ratios no more than indices of log2 k bits.

    width: most columns of a block; blocks are as even as possible. From 32 to 96 little depends on it.
    ratio: bases per non-zero, k/s. 1 makes every block low rank; 4 to 6 left least in what we tried.
    start: bases to start from: singular vectors (and rows where there are too few), or rows drawn at random.
    iterations: rounds of coding and least squares.
    seed: of the rows drawn.
    """
    parts = column_blocks(weight, blocks)
    made = project(parts, starting_bases(parts.float(), bases, start, seed), nonzeros, iterations)
    return DenseSparse.from_blocks(made.bases, made.values, made.indices, weight.shape[1])
