"""Mixture of blocks (Dense2MoE, Zheng et al., ICCV 2025, arXiv:2510.09094): of a group of blocks a text runs a few."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..experts import balance
from ..part import BlockPart, Inside
from ..precision import wide
from ..prefix import numbered, settle, settled
from ..sharing import SharingPart


class BlockRouter(nn.Module):
    """h (B x d) -> which `active` adjacent blocks of a group run, and by what their outputs are weighed.

    A window of blocks scores the sum of its blocks' scores Wh + b (how adjacent blocks are scored is not said; ours);
    p is the softmax over windows, and the best one runs, of equal ones the first. chosen (B) and p (B x windows) are of
    the last call; None before the beginning of a text is there.
    """

    def __init__(self, width: int, blocks: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.weight = nn.Parameter(torch.randn(blocks, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(blocks))
        self.chosen: Tensor | None = None
        self.probabilities: Tensor | None = None

    def choose(self, h: Tensor) -> None:
        scores = functional.linear(h, wide(self.weight), wide(self.bias))
        self.probabilities = scores.unfold(1, self.active, 1).sum(-1).softmax(-1)
        self.chosen = self.probabilities.argmax(-1)

    def runs(self, place: int) -> tuple[Tensor, Tensor]:
        """Whether a block of the group runs (B), and p of what was chosen (B)."""
        assert self.chosen is not None and self.probabilities is not None
        runs = (self.chosen <= place) & (place < self.chosen + self.active)
        return runs, self.probabilities.gather(1, self.chosen[:, None])[:, 0]


class Dense2MoEBlocks(SharingPart, BlockPart):
    """Of a group of consecutive blocks, each text runs `active` adjacent ones behind its beginning.

    One router for the group, in front of its first block, reads the mean of h / |h| over the stream h at the first
    `prompt` real positions. All later positions of the sequence run the chosen blocks and pass the others by: there
    nothing is computed, and nothing is cached. The first positions run all blocks, so that no position knows of what is
    behind it; a text no longer than `prompt` runs all. The paper's router reads the pooled features of an image and a
    text and the condition of a diffusion step, once a sample; language models have no condition (ours).

    In training what a chosen block adds is multiplied by 1, with the gradient of p (ours: the paper's is not said), so
    that the loss reaches the router, and blocks that are passed by have no gradient. The balance of the windows is left
    in `auxiliary`.

    active: κ, how many of the group's blocks run.
    prompt: how many first positions of a sequence decide.
    """

    kind = "block.dense2moe-blocks"
    paper = "arXiv:2510.09094"
    limit = "where all of the group's blocks are active it is the block"
    routes = True

    def __init__(
        self, width: int, place: int, places: int, first: int, *,
        active: Annotated[int, Range(1, 2**10)] = 1, prompt: Annotated[int, Range(1, 2**20)] = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.place, self.places, self.prompt = width, place, places, prompt
        self.active = min(active, places)
        self.share(place, first)

    def new_bank(self) -> BlockRouter:
        return BlockRouter(self.width, self.places, self.active)

    def adopt_bank(self, bank: BlockRouter) -> None:
        raise TransectError("the first block of a group, which chooses among them, cannot be taken out")

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        assert inside.on is not None
        known = settled(inside)
        if known is not None and not self.training:
            return inside.on(x, known[:, None].expand(x.shape[:2]))
        real, number = numbered(x, inside)
        later = number >= self.prompt
        decided = number[:, -1] + 1 >= self.prompt  # (B)
        if self.place == 0:
            self.bank.choose(self._mean(x, real & ~later, inside))
            if self.training:
                p, chosen = self.bank.probabilities[decided], self.bank.chosen[decided]
                self.__dict__["auxiliary"] = balance(p, chosen[:, None]) if len(p) else None
        runs, p = self.bank.runs(self.place)
        if self.place == self.places - 1:
            self.bank.probabilities = None  # which would keep the graph
        y = inside.on(x, ~later | runs[:, None])
        if inside.forget is not None:
            inside.forget(decided & ~runs)
        settle(inside, decided, runs)
        if self.training:
            weighed = x + (1 + p - p.detach())[:, None, None].to(x.dtype) * (y - x)
            return torch.where((later & runs[:, None])[..., None], weighed, y)
        return y

    def _mean(self, x: Tensor, deciding: Tensor, inside: Inside) -> Tensor:
        """The mean direction (B x d) of the deciding positions so far; x: (B x N x d), deciding: (B x N)."""
        total = (functional.normalize(wide(x), dim=-1) * deciding[..., None]).sum(1)
        count = deciding.sum(1)
        if inside.state is not None:
            for name, now in (("total", total), ("deciding", count)):
                inside.state[name] = inside.state[name] + now if name in inside.state else now
            total, count = inside.state["total"], inside.state["deciding"]
        return total / count.clamp_min(1)[:, None]

    @property
    def acts_behind(self) -> int:
        return self.prompt

    @property
    def flops(self) -> int:
        return 2 * self.places * self.width if self.place == 0 else 0
