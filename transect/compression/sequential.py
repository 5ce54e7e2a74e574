"""Calibrating each block on the outputs of the blocks already compressed, and refitting weights there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Block, Matrix
from ..statistics import Batch, InputCovariance, Progress, Recorder, Statistic, Statistics, key_of, task_of
from .allocation import Ranks
from .blockwise import Feed, feeds_of, run_block
from .frame import apply_ranks, factorize_matrix
from .registry import Method
from .weighted_svd import Factorization


@torch.no_grad()
def compress_in_order(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    method: Method,
    settings: Mapping[str, Any],
    ranks: Ranks,
    batches: Sequence[Batch],
    *,
    statistics: Statistics | None,
    factors: Mapping[str, Factorization] | None,
    refit: bool,
    accumulate: torch.dtype = torch.float64,
    progress: Progress | None = None,
) -> None:
    """Compress block after block, in place.

    statistics: of the dense model; gradient statistics are always taken from it.
    factors: if given (calibration on the dense model), they are used as they are. If None, each block's input
        statistics are collected on what the compressed blocks before it put out, and factorized then and there.
    refit: after a block is compressed, its left factors are refitted on the inputs that its matrices now see.
    """
    by_block: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        by_block.setdefault(matrix.block.index, []).append(matrix)
    feeds = feeds_of(anatomy, batches)
    blocks = anatomy.blocks
    for block in progress(blocks, f"{method.name}, block by block") if progress else blocks:
        mine = by_block.get(block.index, [])
        made = factors
        if made is None:
            local = block_statistics(block, mine, method.needs, feeds, statistics, accumulate)
            made = {matrix.name: factorize_matrix(matrix, method, settings, local) for matrix in mine}
        dense = {matrix.name: matrix.weight.clone() for matrix in mine} if refit else {}
        apply_ranks(mine, made, ranks)
        if refit:
            local = block_statistics(block, mine, [InputCovariance()], feeds, None, accumulate)
            for matrix in mine:
                if ranks[matrix.name] is not None:
                    refit_left(matrix, dense[matrix.name], local)
        for item in feeds:
            item.hidden = run_block(block.module, item.hidden, item.calls[block.index])


def block_statistics(
    block: Block,
    matrices: Sequence[Matrix],
    wanted: Sequence[Statistic],
    feeds: Sequence[Feed],
    dense: Statistics | None,
    accumulate: torch.dtype,
) -> Statistics:
    """Statistics of one block's inputs as it is fed now; those of gradients are the dense model's."""
    store = Statistics(accumulate)
    inputs = [statistic for statistic in wanted if statistic.needs == "input"]
    with Recorder(matrices, inputs, store, task_of(block.model)) as recorder:
        for item in feeds:
            recorder.begin_batch(len(item.hidden), item.mask)
            run_block(block.module, item.hidden, item.calls[block.index])
    store.check_finite()
    if dense is not None:
        for matrix in matrices:
            for statistic in wanted:
                if statistic.needs != "input":
                    store.copy_from(dense, key_of(matrix, statistic), statistic)
    return store


def refit_left(matrix: Matrix, dense: Tensor, statistics: Statistics) -> None:
    """Replace L by argmin_L E||(W - L R) x||² with R as it is (SVD-LLM, closed-form update, without bias on purpose).

    dense: the original W (d_out x d_in). statistics: E[x xᵀ] of the inputs x that the matrix sees now. The bias is left
    out of the regression's target, since the low-rank layer keeps it; the authors' code counts it twice.
    """
    operator = matrix.module
    statistic = InputCovariance()
    covariance = statistics.value(key_of(matrix, statistic), statistic).double()
    right = operator.right.weight.double()  # r x d_in
    seen = right @ covariance  # R C
    gram = seen @ right.T  # R C Rᵀ
    # A direction of R that these inputs never excite keeps its old coefficient instead of an arbitrary one.
    left = operator.left.weight.double()
    residual = (dense.double() @ seen.T) - left @ gram  # (W - L R) C Rᵀ
    left = left + residual @ torch.linalg.pinv(gram, hermitian=True)
    operator.left.weight.copy_(left.to(operator.left.weight))
