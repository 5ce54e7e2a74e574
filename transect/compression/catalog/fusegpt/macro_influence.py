"""Macro Influence: how much the last hidden state turns when a block is left out (FuseGPT, arXiv:2411.14507)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from ....anatomy import Anatomy
from ....forward import Batch
from ....forward.blocks import feeds_of, run_block


@torch.no_grad()
def macro_influence(anatomy: Anatomy, batches: Iterable[Batch]) -> Tensor:
    """MI_i = 1 - E cos(h, h without block i) of every block (blocks), float64, between 0 and 2.

    h (d) is the residual stream after the last block, before the final norm; the mean is over all positions but
    padding. What comes before block i is computed once, so that leaving it out costs the blocks after it: about half of
    the squared number of blocks in all. One batch at a time; held are its residual streams, one per block.
    """
    blocks = [block.module for block in anatomy.blocks]
    cosines = torch.zeros(len(blocks), dtype=torch.float64)
    positions = 0
    for batch in batches:
        (feed,) = feeds_of(anatomy, [batch])
        streams = [feed.hidden]  # what enters each block, and last what leaves the model
        for block, call in zip(blocks, feed.calls, strict=True):
            streams.append(run_block(block, streams[-1], call))
        final = _counted(streams.pop(), feed.mask)
        positions += len(final)
        for left_out, hidden in enumerate(streams):
            for block, call in zip(blocks[left_out + 1 :], feed.calls[left_out + 1 :], strict=True):
                hidden = run_block(block, hidden, call)
            cosine = functional.cosine_similarity(final, _counted(hidden, feed.mask), dim=-1)
            cosines[left_out] += cosine.sum(dtype=torch.float64).cpu()
    return 1 - cosines / positions


def _counted(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The positions (n, d) that are not padding, in float32 or wider."""
    rows = hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
