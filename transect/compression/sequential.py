"""Calibrating each block on the outputs of the blocks already compressed, and refitting weights there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..anatomy import Anatomy, Block, Matrix
from ..forward import Batch, computing_wide, task_of
from ..forward.blocks import Feed, feeds_of, run_block
from ..operators import Operator
from ..statistics import InputCovariance, Progress, Recorder, Statistic, Statistics, key_of
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
    with computing_wide(anatomy.model):
        feeds = feeds_of(anatomy, batches)
    blocks = anatomy.blocks
    for block in progress(blocks, f"{label}, block by block") if progress else blocks:
        mine = by_block.get(block.index, [])
        local = dense if needs is None else block_statistics(block, mine, needs, feeds, dense, accumulate)
        weights = {matrix.name: matrix.weight.clone() for matrix in mine} if refit else {}
        compressor(block, mine, local)
        if refit:
            refit_block(block, mine, weights, feeds, accumulate)
        with computing_wide(block.module):
            for item in feeds:
                item.hidden = run_block(block.module, item.hidden, item.calls[block.index])


def refit_block(
    block: Block,
    matrices: Sequence[Matrix],
    weights: Mapping[str, Tensor],
    feeds: Sequence[Feed],
    accumulate: torch.dtype,
) -> None:
    """Refit a block's operators, those of one input after those of another, each on what the refitted ones put out.

    weights: W (d_out x d_in) of every matrix as it was, by name.
    """
    seen = InputCovariance()
    by_source: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        if isinstance(matrix.module, Operator):
            by_source.setdefault(matrix.source, []).append(matrix)
    for together in by_source.values():  # q, k, v; o; gate, up; down: the order in which a block computes them
        local = block_statistics(block, together, [seen], feeds, None, accumulate)
        for matrix in together:
            matrix.module.refit(weights[matrix.name], local.value(key_of(matrix, seen), seen))


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
    recording = Recorder(matrices, local, store, task_of(block.model), [block])
    with computing_wide(block.module), recording as recorder:
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
