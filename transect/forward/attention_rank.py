"""How many distinct patterns an attention map holds (ARank of gamma-MoD, Luo et al., arXiv:2410.13859)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mode import at_rest
from .objective import Batch, real_positions, run_body, to_device
from .watch import watch

LENGTH, SEQUENCES = 256, 16  # tokens of a sequence and sequences that are looked at: an SVD for each head of each


def maps_below(weights: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention maps strictly below the diagonal (B x H x t x t), of the first LENGTH positions, in float32 or wider.

    weights: (B x H x T x T), causal, so that the first positions' map is that of a shorter sequence. real: (B x T),
    false at padding, which does not count.
    """
    start = 0 if real is None else int(real.int().argmax(1).min())
    some = slice(start, start + LENGTH)
    weights = weights[..., some, some]
    weights = weights if weights.dtype == torch.float64 else weights.float()
    if real is not None:
        weights = weights * real[:, None, some, None] * real[:, None, None, some]
    return weights.tril(-1)


def ranks_of(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and effective rank of maps below their diagonals (B x H x T x T), each the mean over heads (B).

    The rank is numerical: singular values above the largest times T times the precision. The effective rank is exp of
    the entropy of the singular values' shares; it has no tolerance.
    """
    values = torch.linalg.svdvals(maps)  # in descending order
    tolerance = values[..., :1] * maps.shape[-1] * torch.finfo(values.dtype).eps
    rank = (values > tolerance).sum(-1).to(torch.float32)
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    effective = torch.special.entr(shares).sum(-1).exp().masked_fill(values.sum(-1) == 0, 0).to(torch.float32)
    return rank.mean(1), effective.mean(1)


@torch.no_grad()
def attention_ranks(anatomy: Any, batches: Any) -> Tensor:
    """ARank of every block, mean over the first SEQUENCES sequences (L); infinite where a block has no map."""
    total, count = torch.zeros(len(anatomy.blocks)), 0
    with at_rest(anatomy.model):
        for batch in batches:
            moved: Batch = to_device(
                {name: rows[: SEQUENCES - count] for name, rows in batch.items()}, anatomy.model.device
            )
            real = real_positions(moved)
            with watch(
                anatomy, ["patterns"], instead={"patterns": lambda one, real=real: maps_below(one, real)}
            ) as seen:
                run_body(anatomy.model, moved)
            for layer in range(len(total)):
                found = seen.patterns.get(layer)
                total[layer] += torch.inf if found is None else ranks_of(found)[0].sum().cpu()
            count += len(moved["input_ids"])
            if count >= SEQUENCES:
                break
    return total / max(1, count)
