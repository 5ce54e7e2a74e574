"""Until which layer a token's own state is still needed: erase it there, and see whether the rest changes.

Csordas et al. 2025 (arXiv:2505.13898), the residual erasure experiment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import watch
from ....forward.blocks import feeds_of, run_blocks
from ...places import wide


@torch.no_grad()
def erasure_effects(specimen: Specimen, ids: Tensor, means: Tensor, start: int) -> Tensor:
    """Effect of erasing each of the first `start` tokens at each layer (L x start): largest |y - y'|_2 behind them.

    ids: n x T. means: L x d or longer, the mean state that each block reads. y: the distributions predicted at
    positions start ... T - 1. Largest over those and over the sequences. For a sequence one pass, and then for each
    layer what is left of a pass over `start` copies.
    """
    effects = torch.zeros(specimen.layers, start)
    where = torch.eye(start, ids.shape[1], dtype=torch.bool, device=ids.device)[..., None]  # copy t loses token t

    def predicted(state: Tensor) -> Tensor:
        return wide(specimen.lens(state[:, start:])).softmax(-1)

    for row in ids:
        (feed,) = feeds_of(specimen.anatomy, [{"input_ids": row[None]}])
        with watch(specimen.anatomy, ["residual"]) as clean:
            plain = predicted(run_blocks(specimen.anatomy, feed, 0, feed.hidden))
        for layer in specimen.shown(range(specimen.layers), "erased layers"):
            h = clean.residual[layer]
            copies = torch.where(where, means[layer].to(h), h)
            moved = predicted(run_blocks(specimen.anatomy, feed, layer, copies)) - plain
            effects[layer] = torch.maximum(effects[layer], moved.norm(dim=-1).amax(1).cpu().to(effects))
    return effects


def last_use(effects: Tensor) -> Tensor:
    """The deepest layer at which a token has at least half of its largest effect (T'), from effects (L x T')."""
    matters = effects >= effects.amax(0) / 2
    return (matters * torch.arange(len(effects))[:, None]).amax(0)
