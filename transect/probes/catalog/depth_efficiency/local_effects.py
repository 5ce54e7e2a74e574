"""What a layer would add if it alone missed what an earlier layer added.

The "local" effect of Csordas et al. 2025 (arXiv:2505.13898). Skipping layer s changes all layers after it at once,
so a late layer may only notice what those in between made of it. Here the rest of the network is as in the clean
run, and layer l > s alone reads h_l - D_s instead of h_l (D_s: what s added in the clean run):

    local effect: |D_l(h_l) - D_l(h_l - D_s)| / max(|D_l(h_l)|, 1e-6)

That is what a public fork of the authors' code computes (Sameer-13/llm_effective_depth,
analysis/analyze_future_local_effects.py), and at the same positions: everywhere but at the first token ("current"),
or only before a cut point, measured behind it ("future"). Taking away what attention or the MLP alone added is
ours. Between neighbours (l = s + 1) it is the same as skipping s, but for attention in a block whose MLP reads the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import Seen, watch
from ....forward.blocks import Feed, feeds_of, run_block, run_blocks
from ...places import wide
from .skipping import PARTS, REACHES, REDUCTIONS, SMALLEST, Variant, reduced, variants_of
from .steps import added_parts

Adding = Callable[[Tensor], Tensor]


@torch.no_grad()
def local_effects(specimen: Specimen, ids: Tensor, cuts: Tensor) -> Tensor:
    """Local effect of every layer, its attention and its MLP on each later layer: 3 x 2 x 3 x L x L.

    The axes are those of `Effects.later`: part, reach, reduction over positions, layer s, layer l; NaN at l = s, 0
    for l < s. ids: P x T. cuts: P x C. One pass over the prompts, and 3 (1 + C) L (L - 1) / 2 passes of single
    blocks, each with the masks and positions that the model gave it. Memory: three states of the prompts for each
    layer.
    """
    layers, variants = specimen.layers, variants_of(ids, cuts)
    (feed,) = feeds_of(specimen.anatomy, [{"input_ids": ids}])
    with watch(specimen.anatomy, ["residual", "attention", "mlp"]) as clean:
        run_blocks(specimen.anatomy, feed, 0, feed.hidden)
    effects = torch.zeros(len(PARTS), len(REACHES), len(REDUCTIONS), layers, layers)
    for layer in specimen.shown(range(1, layers), "local effects"):
        h, plain = clean.residual[layer], by_part(clean, layer)[0]
        with alone(specimen, feed, layer) as added:
            for earlier in range(layer):
                for part, missing in enumerate(by_part(clean, earlier)):
                    effects[part, :, :, earlier, layer] = _moved(added, h, plain, missing, variants)
    effects.diagonal(dim1=-2, dim2=-1).fill_(torch.nan)
    return effects


def _moved(added: Adding, h: Tensor, plain: Tensor, missing: Tensor, variants: list[Variant]) -> Tensor:
    """Change of what a layer adds without `missing` in its input: by reach and reduction over positions (2 x 3)."""
    found: list[list[Tensor]] = [[] for _ in REACHES]
    sizes = plain.norm(dim=-1).clamp_min(SMALLEST)
    for reach, where, measured in variants:
        state = wide(h) - missing.masked_fill(~where[..., None], 0)
        relative = (added(state.to(h.dtype)) - plain).norm(dim=-1) / sizes
        found[reach].append(relative[measured])
    return torch.stack([reduced(torch.cat(pieces)) for pieces in found]).cpu().float()


def by_part(seen: Seen, layer: int) -> Tensor:
    """What a layer, its attention and its MLP add (3 x P x T x d, as in PARTS), float32 or wider."""
    attention, mlp = added_parts(seen, layer, seen.residual[layer])
    return torch.stack([attention + mlp, attention, mlp])


@contextmanager
def alone(specimen: Specimen, feed: Feed, layer: int) -> Iterator[Adding]:
    """Inside the `with`: a function from what the block reads to what it adds (B x T x d), float32 or wider."""
    block, call = specimen.anatomy.block_list[layer], feed.calls[layer]
    with watch(specimen.anatomy, ["attention", "mlp"], [layer]) as seen:

        def added(state: Tensor) -> Tensor:
            run_block(block, state, call)
            attention, mlp = added_parts(seen, layer, state)
            return attention + mlp

        yield added
