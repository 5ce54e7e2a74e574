"""Whether a channel is predicted better than by chance: predictions permuted in blocks of samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 10  # samples, as in the paper
_ENTRIES = 2**23  # numbers of the permuted predictions in memory at once


def block_p(predicted: Tensor, observed: Tensor, permutations: int, seed: int) -> Tensor:
    """One-sided p value of each channel's r (V): share of permutations with an r as large, itself counted too.

    Blocks of BLOCK samples change places, so that what lies within a block keeps its correlation in time; the last one
    may be shorter. predicted, observed: m x V.
    """
    a, b = (_standard(x.double()) for x in (predicted, observed))
    own = (a * b).sum(0)
    blocks = torch.arange(len(a)).split(BLOCK)
    generator, count = torch.Generator().manual_seed(seed), torch.ones_like(own)
    step = max(1, _ENTRIES // a.numel())
    for start in range(0, permutations, step):
        chosen = range(start, min(start + step, permutations))
        orders = torch.stack(
            [torch.cat([blocks[n] for n in torch.randperm(len(blocks), generator=generator).tolist()]) for _ in chosen]
        )
        count += (torch.einsum("pmv,mv->pv", a[orders], b) >= own - 1e-12).sum(0)
    return count / (permutations + 1)


def false_discovery(p: Tensor) -> Tensor:
    """The smallest rate of false discoveries at which each is one, by Benjamini and Hochberg."""
    from scipy.stats import false_discovery_control

    return torch.from_numpy(np.asarray(false_discovery_control(p.numpy())))


def _standard(x: Tensor) -> Tensor:
    """Centred and of length 1 in each column; 0 where a column does not vary."""
    x = x - x.mean(0)
    length = x.norm(dim=0)
    return torch.where(length > 0, x / length.clamp_min(torch.finfo(x.dtype).tiny), 0)
