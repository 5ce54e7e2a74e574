"""Calibrating each block on the outputs of the blocks already compressed, and refitting weights there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..anatomy import Anatomy, Block, Matrix
from ..operators import Operator
from ..statistics import Batch, InputCovariance, Progress, Recorder, Statistic, Statistics, key_of, task_of
from .blockwise import Feed, feeds_of, run_block
from .compressors import Compressor


@torch.no_grad()
def compress_in_order(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    compressor: Compressor,
    batches: Sequence[Batch],
    *,
    dense: Statistics | None,
    needs: Sequence[Statistic] | None,
    refit: bool,
    accumulate: torch.dtype = torch.float64,
    progress: Progress | None = None,
    label: str = "blocks",
) -> None:
    """Compress block after block, in place.

    dense: statistics of the dense model; those of gradients are always taken from it.
    needs: if given, each block is compressed by these statistics of what the compressed blocks before it put out; if
        None, by the dense model's.
    refit: after a block is compressed, its matrices are refitted on the inputs that they now see.
    """
    by_block: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        by_block.setdefault(matrix.block.index, []).append(matrix)
    feeds = feeds_of(anatomy, batches)
    blocks = anatomy.blocks
    for block in progress(blocks, f"{label}, block by block") if progress else blocks:
        mine = by_block.get(block.index, [])
        local = dense if needs is None else block_statistics(block, mine, needs, feeds, dense, accumulate)
        weights = {matrix.name: matrix.weight.clone() for matrix in mine} if refit else {}
        compressor(block, mine, local)
        if refit:
            changed = [matrix for matrix in mine if isinstance(matrix.module, Operator)]
            seen = InputCovariance()
            local = block_statistics(block, changed, [seen], feeds, None, accumulate)
            for matrix in changed:
                matrix.module.refit(weights[matrix.name], local.value(key_of(matrix, seen), seen))
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
    """Statistics of one block as it is fed now; those of gradients are the dense model's."""
    store = Statistics(accumulate)
    local = [statistic for statistic in wanted if statistic.needs not in ("gradient", "both")]
    with Recorder(matrices, local, store, task_of(block.model), [block]) as recorder:
        for item in feeds:
            recorder.begin_batch(len(item.hidden), item.mask)
            run_block(block.module, item.hidden, item.calls[block.index])
    store.check_finite()
    if dense is not None:
        for matrix in matrices:
            for statistic in wanted:
                if statistic.needs in ("gradient", "both"):
                    store.copy_from(dense, key_of(matrix, statistic), statistic)
    return store
