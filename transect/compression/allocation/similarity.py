"""MoDeGPT's allocation: blocks that turn the residual stream least lose most (Lin et al., arXiv:2408.09632)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...statistics import BlockSimilarity, Statistics
from ..registry import Range
from .registry import sharing
from .table import Shares, Unit


def importance(matrix: Matrix, statistics: Statistics, **settings: Any) -> float:
    """1 - E[cos(block input, block output)] of the matrix's block."""
    return 1 - float(statistics.value(f"blocks.{matrix.block.index}", BlockSimilarity()))


@sharing("similarity", paper="arXiv:2408.09632", needs=[BlockSimilarity()], score=importance)
def similarity(
    units: Sequence[Unit],
    keep: float,
    scores: Mapping[str, float],
    *,
    temperature: Annotated[float, Range(1e-6, 1e6)] = 0.015,
    cap: Annotated[float, Range(0, 0.99)] = 0.8,
) -> Shares:
    """Remove most from the blocks whose output is most like their input, smoothed by an entropy term.

    With the importance s = 1 - E cos(block input, block output) block b of bytes_b bytes loses the share
    φ_b ∝ exp(-s_b/ε), Σ bytes_b φ_b = (1 - keep) Σ bytes_b: for blocks of one size L φ̄ softmax(-s/ε). It maximises
    Σ bytes_b (s_b (1 - φ_b) + ε H(φ_b)), H(φ) = -φ log φ. No block loses more than the cap (or 1 - keep, if that is
    more); what it would lose beyond is shared by the others in proportion. All matrices of a block share alike.

    temperature: ε; large is uniform, towards 0 only the least important blocks lose anything. The default is a
        re-implementation's and not checked against the paper; models of few blocks may want more.
    cap: largest share that a block may lose; from a re-implementation too.
    """
    sizes: dict[int, int] = {}
    of_block: dict[int, float] = {}
    for unit in units:
        sizes[unit.block] = sizes.get(unit.block, 0) + unit.bytes
        of_block[unit.block] = scores[unit.name]
    blocks = list(sizes)
    removed = removed_shares(
        torch.tensor([of_block[block] for block in blocks], dtype=torch.float64),
        torch.tensor([sizes[block] for block in blocks], dtype=torch.float64),
        1 - keep,
        temperature,
        cap,
    )
    shares = dict(zip(blocks, (1 - removed).tolist(), strict=True))
    return {unit.name: shares[unit.block] for unit in units}


def removed_shares(importances: Tensor, sizes: Tensor, removed: float, temperature: float, cap: float) -> Tensor:
    """φ (blocks): ∝ exp(-s/ε) under the cap, of which the mean weighted by `sizes` is `removed`."""
    cap = max(cap, removed)
    shares = torch.zeros_like(importances)
    free = torch.ones_like(importances, dtype=torch.bool)
    while free.any():
        left = removed * sizes.sum() - (shares * sizes).sum()
        logits = -importances[free] / temperature + sizes[free].log()  # bytes that each loses
        shares[free] = left * logits.softmax(0) / sizes[free]
        over = free & (shares > cap)
        if not over.any():
            break
        shares[over] = cap
        shares[free & ~over] = 0
        free &= ~over
    return shares.clamp(0, cap)
