"""Until which layer a token's own state is still needed: erase it there, and see whether the rest changes.

Csordas et al. 2025 (arXiv:2505.13898), the residual erasure experiment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import Specimen, changed, watch
from .places import wide


@torch.no_grad()
def continued(specimen: Specimen, ids: Tensor, start: int) -> Tensor:
    """Predicted distributions (B x T - start x V) at positions from `start` on, with what is changed just now."""
    with watch(specimen.anatomy, ["residual"], [specimen.layers]) as seen:
        specimen.model.base_model(input_ids=ids, use_cache=False)
    return wide(specimen.lens(seen.residual[specimen.layers][:, start:])).softmax(-1)


@torch.no_grad()
def erased(specimen: Specimen, ids: Tensor, layer: int, where: Tensor, mean: Tensor, start: int) -> Tensor:
    """As `continued`, with what block `layer` reads replaced by `mean` (d) where `where` (B x T) is True."""

    def erase(h: Tensor) -> Tensor:
        return torch.where(where[..., None], mean.to(h), h)

    with changed(specimen.anatomy, {("residual", layer): erase}):
        return continued(specimen, ids, start)


@torch.no_grad()
def erasure_effects(specimen: Specimen, ids: Tensor, means: Tensor, start: int) -> Tensor:
    """Effect of erasing each of the first `start` tokens at each layer (L x start): largest |y - y'|_2 behind them.

    ids: n x T. means: L x d or longer, the mean state that each block reads. y: the distributions predicted at
    positions start ... T - 1. Largest over those and over the sequences. n L passes over `start` copies each.
    """
    effects = torch.zeros(specimen.layers, start)
    length = ids.shape[1]
    where = torch.eye(start, length, dtype=torch.bool, device=ids.device)  # copy t loses token t
    for row in ids:
        plain = continued(specimen, row[None], start)
        copies = row.expand(start, length)
        for layer in specimen.shown(range(specimen.layers), "erased layers"):
            moved = erased(specimen, copies, layer, where, means[layer], start) - plain
            effects[layer] = torch.maximum(effects[layer], moved.norm(dim=-1).amax(1).cpu().to(effects))
    return effects


def last_use(effects: Tensor) -> Tensor:
    """The deepest layer at which a token has at least half of its largest effect (T'), from effects (L x T')."""
    matters = effects >= effects.amax(0) / 2
    return (matters * torch.arange(len(effects))[:, None]).amax(0)
