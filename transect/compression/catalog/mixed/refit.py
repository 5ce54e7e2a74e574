"""Refitting a compressed model to the dense one, block by block: what earlier blocks got wrong, later ones mend.

SVD-LLM's update (`sequential.refit_block`) asks each matrix to do to its new inputs x' what W does to them. This one
asks it to put out what W puts out in the dense model, W x. Both are least squares in the operator's last factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....anatomy import Anatomy, ExpertMatrix, Matrix
from ....forward import Batch, computing_wide
from ....forward.blocks import feeds_of, run_block
from ....operators import Operator
from ....statistics import Progress


@torch.no_grad()
def refit_to_dense(
    anatomy: Anatomy, dense: Anatomy, batches: Sequence[Batch], progress: Progress | None = None
) -> None:
    """Refit every operator of a compressed model that has a `refit`, in place, with the dense model's inputs.

    dense: the model before compression, with the same blocks. Both models' residual streams are held in memory.
    The experts of a mixture stay as they are: the compressed model may send other positions there than the dense one.
    """
    with computing_wide(anatomy.model, dense.model):
        ours, theirs = feeds_of(anatomy, batches), feeds_of(dense, batches)
    pairs = list(zip(anatomy.blocks, dense.blocks, strict=True))
    for block, twin in progress(pairs, "refit") if progress else pairs:
        by_source: dict[str, list[Matrix]] = {}
        twins = {matrix.name: matrix for matrix in twin.matrices()}
        for matrix in block.matrices():
            if isinstance(matrix, ExpertMatrix) or matrix.name not in twins:
                continue
            if _can_refit(matrix.module) and matrix.shape == twins[matrix.name].shape:
                by_source.setdefault(matrix.source, []).append(matrix)
        for together in by_source.values():  # in the order in which a block computes them
            other = twins[together[0].name]
            seen, cross = _second_moments(together[0], block, ours, other, twin, theirs)
            for matrix in together:
                matrix.module.refit(twins[matrix.name].weight, seen, cross)
        for feeds, module in ((ours, block.module), (theirs, twin.module)):
            with computing_wide(module):
                for item in feeds:
                    item.hidden = run_block(module, item.hidden, item.calls[block.index])


def _can_refit(module: Any) -> bool:
    return isinstance(module, Operator) and type(module).refit is not Operator.refit


def _second_moments(
    matrix: Matrix, block: Any, ours: Sequence[Any], other: Matrix, twin: Any, theirs: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """E[x' x'ᵀ] and E[x x'ᵀ] (d_in x d_in) of a matrix's inputs x' now and x in the dense model."""
    size = matrix.shape[1]
    like = matrix.module.weight
    seen, cross = (torch.zeros(size, size, dtype=torch.float64, device=like.device) for _ in range(2))
    count = 0
    for mine, its in zip(ours, theirs, strict=True):
        new = _inputs(matrix, block, mine)
        old = _inputs(other, twin, its)
        if mine.mask is not None:
            counted = mine.mask.flatten().bool()
            new, old = new[counted], old[counted]
        seen += (new.T @ new).double()
        cross += (old.T @ new).double()
        count += len(new)
    return seen / count, cross / count


def _inputs(matrix: Matrix, block: Any, item: Any) -> Tensor:
    """What enters a matrix when its block runs on a feed (positions x d_in), float32 or wider."""
    caught: list[Tensor] = []
    handle = matrix.module.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0]))
    try:
        with computing_wide(block.module):
            run_block(block.module, item.hidden, item.calls[block.index])
    finally:
        handle.remove()
    x = caught[0].reshape(-1, caught[0].shape[-1])
    return x if x.dtype == torch.float64 else x.float()
