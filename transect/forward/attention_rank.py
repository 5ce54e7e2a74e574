"""How many distinct patterns an attention map holds (ARank of gamma-MoD, Luo et al., arXiv:2410.13859)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mode import at_rest
from .objective import Batch, real_positions, run_body, to_device
from .watch import watch


def attention_rank(weights: Tensor, real: Tensor | None = None) -> Tensor:
    """Rank of each map below its diagonal, mean over heads (B).

    weights: (B x H x T x T), causal. real: (B x T), false at padding, which does not count. The rank is numerical, in
    float32 or wider: singular values above the largest times T times the precision.
    """
    return torch.linalg.matrix_rank(_below(weights, real)).to(torch.float32).mean(1)


def effective_rank(weights: Tensor, real: Tensor | None = None) -> Tensor:
    """exp of the entropy of the singular values' shares, of the same maps, mean over heads (B); it has no tolerance."""
    values = torch.linalg.svdvals(_below(weights, real))
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp().masked_fill(values.sum(-1) == 0, 0).to(torch.float32).mean(1)


def _below(weights: Tensor, real: Tensor | None) -> Tensor:
    """The maps strictly below the diagonal, without padding."""
    weights = weights if weights.dtype == torch.float64 else weights.float()
    if real is not None:
        weights = weights * real[:, None, :, None] * real[:, None, None, :]
    return weights.tril(-1)


@torch.no_grad()
def attention_ranks(anatomy: Any, batches: Any) -> Tensor:
    """ARank of every block, mean over sequences (L); infinite where a block has no attention map."""
    total, count = torch.zeros(len(anatomy.blocks)), 0
    with at_rest(anatomy.model):
        for batch in batches:
            moved: Batch = to_device(batch, anatomy.model.device)
            with watch(anatomy, ["patterns"]) as seen:
                run_body(anatomy.model, moved)
            real = real_positions(moved)
            for layer in range(len(total)):
                found = seen.patterns.get(layer)
                total[layer] += torch.inf if found is None else attention_rank(found, real).sum().cpu()
            count += len(moved["input_ids"])
    return total / max(1, count)
