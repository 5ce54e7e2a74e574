"""What a layer is good for, seen by leaving it out: for the layers after it, for the output, for later tokens.

Csordas et al. 2025 (arXiv:2505.13898), section on skipped layers. A layer is skipped at some positions: there its
output is its input. Everything after it is computed anew on the changed stream. With D_l = h_{l+1} - h_l (d) what
layer l adds and y the predicted distribution, and a prime for the run with layer s skipped:

    effect on layer l > s: |D_l - D'_l| / max(|D_l|, 1e-6)      effect on the output: |y - y'|_2, at most sqrt(2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....anatomy import Anatomy
from ....data import Specimen
from ....forward import changed, watch
from ....forward.blocks import Feed, feeds_of, run_blocks
from ....forward.change import Change
from ...places import wide

PARTS = {"layer": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}
REACHES = ("current", "future")
REDUCTIONS = ("max", "mean", "median")
SMALLEST = 1e-6  # of the length of what a layer adds, in a denominator
Variant = tuple[int, Tensor, Tensor]  # which reach; where something is skipped, and where measured (P x T each)


def skips(anatomy: Anatomy, layer: int, where: Tensor, units: Sequence[str]) -> dict[tuple[str, int], Change]:
    """Changes that let sublayers of a layer add nothing where `where` (B x T) is True, but for dropped ones."""
    block = anatomy.blocks[layer]

    def cut(x: Tensor) -> Tensor:
        return x.masked_fill(where.reshape(*x.shape[:-1], 1), 0)  # some models flatten batch and positions

    return {(unit, layer): cut for unit in units if getattr(block, unit) is not None}


@dataclass(frozen=True)
class Run:
    """A pass over ids (P x T) from some layer on, float32 or wider.

    added: what each layer from there on adds (n x P x T x d). logits: m x V, of the positions that were asked for.
    """

    added: Tensor
    logits: Tensor


@torch.no_grad()
def run(specimen: Specimen, feed: Feed, first: int, state: Tensor, where: Tensor) -> Run:
    """The model's pass from the state (P x T x d) that block `first` reads, with whatever is changed at the moment.

    where: the positions (P x T) whose logits are wanted.
    """
    layers = range(first, specimen.layers)
    with watch(specimen.anatomy, ["attention", "mlp"], layers) as seen:
        logits = specimen.lens(run_blocks(specimen.anatomy, feed, first, state)[where])
    added = torch.zeros(len(layers), *state.shape, dtype=wide(state).dtype, device=state.device)
    for part in (seen.attention, seen.mlp):
        for layer, x in part.items():
            added[layer - first] += wide(x).reshape(state.shape)
    return Run(added, wide(logits))


@dataclass(frozen=True)
class Effects:
    """Of skipping each of L layers, by part of the layer (3, as in PARTS), reach and reduction over positions.

    later: 3 x 2 x 3 x L x L, [..., s, l] on what layer l adds; NaN at l = s.
    output: 3 x 2 x 3 x L, on probabilities.
    logits: 3 x 2 x 3 x L, length of the change of the centred logits over their own length.
    loss: 3 x L, mean next-token loss in nats with the part skipped at all positions but the first.
    by_prompt: 2 x L x P, largest effect of the whole layer on a prompt's output.
    baseline: loss of each prompt (P), nats.
    """

    later: Tensor
    output: Tensor
    logits: Tensor
    loss: Tensor
    by_prompt: Tensor
    baseline: Tensor


@torch.no_grad()
def skip_effects(specimen: Specimen, ids: Tensor, cuts: Tensor) -> Effects:
    """Skip every layer, its attention and its MLP, one at a time.

    ids: P x T. cuts: P x C positions t. "current" skips everywhere but at the first token and measures there;
    "future" skips from the second token to t - 1 and measures from t on. The first token is never skipped.
    3 L (1 + C) passes over the prompts, each from the skipped layer on; memory: a few times P x T x (V + L d) numbers.
    """
    layers, prompts = specimen.layers, len(ids)
    (feed,) = feeds_of(specimen.anatomy, [{"input_ids": ids}])
    with watch(specimen.anatomy, ["residual"]) as clean:
        base = run(specimen, feed, 0, feed.hidden, torch.ones_like(ids, dtype=torch.bool))
    variants, dense = variants_of(ids, cuts), base.logits.view(*ids.shape, -1)
    probabilities, sizes = dense.softmax(-1), base.added.norm(dim=-1).clamp_min(SMALLEST)
    centred, losses = _centred(dense), _losses(dense, ids)
    shape = (len(PARTS), len(REACHES), len(REDUCTIONS), layers)
    later, output, logits = torch.zeros(*shape, layers), torch.zeros(shape), torch.zeros(shape)
    loss, by_prompt = torch.zeros(len(PARTS), layers), torch.zeros(len(REACHES), layers, prompts)
    for layer in specimen.shown(range(layers), "skipped layers"):
        for part, units in enumerate(PARTS.values()):
            found: list[list[Tensor]] = [[] for _ in REACHES]
            for reach, where, measured in variants:
                with changed(specimen.anatomy, skips(specimen.anatomy, layer, where, units)):
                    now = run(specimen, feed, layer, clean.residual[layer], measured)
                moved = (now.logits.softmax(-1) - probabilities[measured]).norm(dim=-1)
                before = centred[measured]
                shift = (_centred(now.logits) - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(SMALLEST)
                relative = torch.zeros_like(sizes)  # none on the layers before
                relative[layer:] = (now.added - base.added[layer:]).norm(dim=-1) / sizes[layer:]
                found[reach].append(torch.cat([relative[:, measured], moved[None], shift[None]]))
                if reach == 0:  # measured at all but the first token, whose prediction stays
                    behind = _losses(now.logits.view(prompts, -1, now.logits.shape[-1]), ids[:, 1:])
                    loss[part, layer] = torch.cat([losses[:, :1], behind], 1).mean()
                if part == 0:
                    worst = moved.new_zeros(ids.shape).masked_scatter(measured, moved).amax(1).cpu().to(by_prompt)
                    by_prompt[reach, layer] = torch.maximum(by_prompt[reach, layer], worst)
            for reach, pieces in enumerate(found):
                values = reduced(torch.cat(pieces, 1)).cpu().to(later)
                later[part, reach, :, layer] = values[:, :layers]
                output[part, reach, :, layer] = values[:, layers]
                logits[part, reach, :, layer] = values[:, layers + 1]
    later.diagonal(dim1=-2, dim2=-1).fill_(torch.nan)
    return Effects(later, output, logits, loss, by_prompt, losses.mean(1).cpu().float())


def variants_of(ids: Tensor, cuts: Tensor) -> list[Variant]:
    """Skipped everywhere but at the first token; and for each column of cuts (P x C) before it, measured behind."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    after_first = place > 0
    behind = [(1, after_first & (place < cut[:, None]), place >= cut[:, None]) for cut in cuts.T.to(ids.device)]
    return [(0, after_first, after_first), *behind]


def reduced(values: Tensor) -> Tensor:
    """Largest, mean and median over the last dimension (... x n): 3 x ..., as in REDUCTIONS."""
    return torch.stack([values.amax(-1), values.mean(-1), values.median(-1).values])


def cut_points(prompts: int, length: int, count: int, seed: int) -> Tensor:
    """Different positions of 8, 16, ... up to length - 4 for each prompt (P x C), at most `count`."""
    points = torch.arange(8, length - 3, 8)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(prompts, len(points), generator=generator).argsort(1)[:, :count]
    return points[drawn]


def depth_score(effects: Tensor) -> Tensor:
    """Mean layer, weighted by the layers' effects (L x n): n numbers from 0 to L - 1, NaN if no layer matters."""
    numbers = torch.arange(len(effects), dtype=effects.dtype)
    return (numbers[:, None] * effects).sum(0) / effects.sum(0)


def _centred(logits: Tensor) -> Tensor:
    """Without the constant that a softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss of every next token (P x T - 1), nats."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
