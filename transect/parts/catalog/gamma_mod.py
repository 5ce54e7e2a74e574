"""Gamma-MoD (Luo et al., 2024, arXiv:2410.13859): blocks that process routed tokens only, all with one router."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..part import BlockPart, Inside
from ..precision import wide
from ..prefix import largest, numbered, targets_in
from ..sharing import SharingPart


def check_some_kept(routable: int, skip: float, choose: str, threshold: float) -> None:
    """TransectError where no router could have a routable token processed."""
    if _kept(routable, skip) < 1:
        raise TransectError(f"gamma-mod: skip={skip:g} leaves out all {routable} routable tokens: choose less")
    if choose == "threshold" and threshold == 1:
        raise TransectError("gamma-mod: no probability is above threshold=1, so that no token is kept: choose less")


def _kept(routable: int, skip: float) -> int:
    return routable - int(Fraction(str(skip)) * routable)


class TokenRouter(nn.Module):
    """h (..., d) -> logits of leaving a token out and of processing it (..., 2)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width) * 0.02)
        self.bias = nn.Parameter(torch.tensor([0.0, start]))

    def forward(self, h: Tensor) -> Tensor:
        return functional.linear(wide(h), wide(self.weight), wide(self.bias))


class GammaMoD(SharingPart, BlockPart):
    """Of the first tokens of a text, the block processes those that its router says; one router for all such blocks.

    With h the stream behind the block's own input norm, p = softmax(router(h))₁. The first `routable` real positions
    may be left out, the others are protected. In training the largest p are kept, all but ⌊skip * routable⌋ (in whole
    numbers), of equal ones the first; afterwards those with p above `threshold`, or again the largest. What the MLP
    adds is multiplied by p, so that the loss reaches the router. Cross-entropy of the router with what was kept is left
    in `auxiliary`.

    Positions keep their own numbers. The code renumbers those that a prompt keeps, but not the tokens behind it, so
    that it computes another thing token by token than at once; this is not offered.

    The paper's router has no bias; ours lets it begin near p = 1, where the block is nearly what it was.

    routable: how many first positions may be left out; a text that begins shorter leaves out none by rank.
    skip: share of them that is left out by rank.
    choose: after training, by threshold, as the code does, or by rank (top), as in training.
    threshold: p of a routable token above which it is processed.
    later: p from which a token behind them is processed; 0 is all of them, the code has 0.5 for new tokens.
    start: of the router's logit for processing; 0 halves every MLP at first.
    """

    kind = "block.gamma-mod"
    paper = "arXiv:2410.13859"
    limit = "with skip = 0 and p = 1 it is the block"
    routes = True

    def __init__(
        self, width: int, place: int, first: int, *,
        routable: Annotated[int, Range(1, 2**20)] = 32, skip: Annotated[float, Range(0, 1)] = 0.5,
        choose: Literal["threshold", "top"] = "threshold", threshold: Annotated[float, Range(0, 1)] = 0.005,
        later: Annotated[float, Range(0, 1)] = 0.0, start: Annotated[float, Range(-100, 100)] = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_some_kept(routable, skip, choose, threshold)
        self.routable, self.kept = routable, _kept(routable, skip)
        self.choose, self.threshold, self.later, self.start, self.width = choose, threshold, later, start, width
        self.share(place, first)

    def new_bank(self) -> TokenRouter:
        return TokenRouter(self.width, self.start)

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        assert inside.on is not None
        z = self.bank(inside.norms[0](x))
        p = torch.softmax(z, dim=-1)[..., 1]  # B x N
        if self.training or self.choose == "top":
            real, target = targets_in(x, inside, self.routable)
            kept = largest(p, target, self.kept) | ~target
        else:
            real, number = numbered(x, inside)
            kept = torch.where(number < self.routable, p > self.threshold, p >= self.later)
        if self.training:
            self.__dict__["auxiliary"] = functional.cross_entropy(z[real], kept[real].long())
        return inside.on(x, kept, p)

    @property
    def acts_behind(self) -> int:
        return self.routable

    @property
    def flops(self) -> int:
        return 4 * self.width
