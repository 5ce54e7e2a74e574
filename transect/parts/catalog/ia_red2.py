"""IA-RED²: a vision transformer that drops patches, image by image, where a small interpreter finds them redundant (Pan
et al., NeurIPS 2021, arXiv:2106.12620).

The paper's text was not at hand: its abstract, project page and demo say that blocks are in groups, an interpreter with
several heads scores every patch before each group, and low scores are dropped for good. The formula of the score, and
what is said of its start, are our design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..part import BlockPart, Inside
from ..sharing import SharingPart

START = 0.8  # score with which patches begin, so that dropping them all is not the first thing that is learned
SPREAD = 0.3  # standard deviation of a head's logits at the start
EXPLORING = 0.2  # of the other action while actions are drawn


@dataclass
class Decision:
    """What one group decided for a batch: each (B x P), over all patches of the image, in their order.

    scores: I, NaN for patches that an earlier group dropped. present, kept: before and after. log_probability: of the
    actions that were drawn, summed over patches (B), with a gradient for the interpreter; None where none were drawn.
    """

    scores: Tensor
    present: Tensor
    kept: Tensor
    log_probability: Tensor | None = None


class Tokens(nn.Module):
    """What the groups of one model tell each other while a batch goes through.

    real: which positions are there (B x N), None for all. at: which patches they are (B x N - prefix). decisions: of
    the groups so far. drawing: whether the group `learning` draws its actions; those behind it keep everything. None:
    every group decides by the threshold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.real: Tensor | None = None
        self.at: Tensor | None = None
        self.patches = 0
        self.decisions: list[Decision] = []
        self.learning: int | None = None
        self.drawing = False

    def begin(self, x: Tensor, real: Tensor | None, prefix: int) -> None:
        """A new batch (B x N x d) comes in."""
        self.real, self.patches, self.decisions = real, x.shape[1] - prefix, []
        self.at = torch.arange(self.patches, device=x.device).expand(len(x), -1)

    def over_all(self, values: Tensor, missing: float) -> Tensor:
        """Values of the positions that are left (B x n) in the places of all patches (B x P)."""
        assert self.at is not None
        empty = torch.full((len(values), self.patches), missing, dtype=values.dtype, device=values.device)
        return empty.scatter(1, self.at, values)


class Interpreter(nn.Module):
    """I_j = 1/H Σ_h sigmoid(F_q^h(x_j) · F_k^h(P) / sqrt(d / H)): the score of a position (..., d) -> (...).

    P is a learned vector, F_q and F_k linear maps d -> d. x is normed first, without a gain: the stream's length grows
    with depth (ours, as the division is).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.policy = nn.Parameter(torch.randn(width))
        if not self.policy.is_meta:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Scores of START, with differences of SPREAD between positions."""
        k = self.key(self.policy).unflatten(0, (self.heads, -1))  # H x d/H
        size, length = k.shape[1], k.norm(dim=1, keepdim=True).clamp_min(1e-6)
        towards = k / length
        logit = math.log(START / (1 - START)) * math.sqrt(size)
        self.query.bias.copy_((logit * towards / length).flatten())
        along = torch.randn(self.heads, 1, self.query.in_features) * SPREAD * math.sqrt(size / self.query.in_features)
        self.query.weight.copy_((towards[..., None] * along / length[..., None]).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x, x.shape[-1:])
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k = self.key(self.policy).unflatten(0, (self.heads, -1))
        logits = (q * k).sum(-1) / math.sqrt(k.shape[1])
        return logits.sigmoid().mean(-1)


class IARed2(SharingPart, BlockPart):
    """Around every block: the first of each group scores the patches and drops those below the threshold for good.

    In training mode dropped patches stay where they are and no other position sees them; otherwise they are taken out,
    and where the images of a batch keep different numbers, the shorter ones are filled up with what nobody sees.
    The class position, and DeiT's distillation position, always stay, and so does the best of the patches.

    groups: of blocks, each as long as the others to within one.
    threshold: a patch whose score is lower is dropped; at 0 all stay.
    prefix: positions in front of the patches, which are never dropped.
    """

    kind = "block.ia-red2"
    paper = "arXiv:2106.12620"
    limit = "with a threshold of 0 it is the block"
    images = True

    def __init__(
        self, width: int, heads: int, causal: bool, place: int, places: int, first: int, *,
        groups: Annotated[int, Range(1, 1000)] = 3, threshold: Annotated[float, Range(0, 1)] = 0.5,
        prefix: Annotated[int, Range(1, 16)] = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if causal:
            raise TransectError("ia-red2 drops positions, and a model that writes text needs them: take one of images")
        if groups > places:
            raise TransectError(f"groups={groups} are more than the {places} blocks: choose fewer")
        if width % heads:
            raise TransectError(f"the {heads} heads of an interpreter do not divide the width {width}")
        starts = [group * places // groups for group in range(groups)]
        self.group = starts.index(place) if place in starts else None
        self.threshold, self.prefix = threshold, prefix
        self.share(place, first)
        if self.group is not None:
            self.interpreter = Interpreter(width, heads)

    def new_bank(self) -> Tokens:
        return Tokens()

    def adopt_bank(self, bank: Any) -> None:
        """The first group decides what there is: without it there is nothing to go on from."""
        raise TransectError("the first block of a model with ia-red2 cannot be taken out")

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        if self.group == 0:
            self.bank.begin(x, inside.real(), self.prefix)
        if self.group is not None:
            x = self._dropped(x)
        return inside.block(x) if self.bank.real is None else inside.masked(x, self.bank.real)

    def _dropped(self, x: Tensor) -> Tensor:
        """The stream without what this group drops, and the bank told."""
        bank, prefix = self.bank, self.prefix
        if self.training and bank.learning == self.group:
            x = x.detach()  # what is in front of the group that learns is not trained with it
        scores = self.interpreter(x[:, prefix:].detach())
        present = torch.ones_like(scores, dtype=torch.bool) if bank.real is None else bank.real[:, prefix:]
        keep, log_probability = self._chosen(scores, present)
        best = scores.masked_fill(~present, -1).argmax(1, keepdim=True)
        keep = torch.where(keep.any(1, keepdim=True), keep, torch.zeros_like(keep).scatter(1, best, True))
        bank.decisions.append(
            Decision(
                bank.over_all(scores.detach().masked_fill(~present, torch.nan), torch.nan),
                bank.over_all(present, False), bank.over_all(keep, False), log_probability,
            )
        )  # fmt: skip
        always = torch.ones(len(x), prefix, dtype=torch.bool, device=x.device)
        if self.training:
            bank.real = None if bank.real is None and bool(keep.all()) else torch.cat([always, keep], 1)
            return x
        counts = keep.sum(1)
        most = int(counts.max())
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # those that stay, in their order
        bank.at = bank.at.gather(1, order)
        there = torch.arange(most, device=x.device) < counts[:, None]
        bank.real = None if bool(there.all()) else torch.cat([always, there], 1)
        stays = x[:, prefix:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :prefix], stays], 1)

    def _chosen(self, scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which patches stay (B x n), and the log-probability of that (B) where it was drawn."""
        learning = self.bank.learning
        if self.training and learning is not None and self.group > learning:
            return present, None
        if not (self.training and self.bank.drawing and self.group == learning):
            return present & (scores >= self.threshold), None
        chance = scores * (1 - EXPLORING) + (1 - scores) * EXPLORING
        keep = torch.bernoulli(chance.detach()).bool()
        logs = torch.where(keep, chance, 1 - chance).log()
        return keep & present, (logs * present).sum(1)
