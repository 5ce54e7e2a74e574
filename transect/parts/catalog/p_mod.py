"""p-MoD (Zhang et al., ICCV 2025, arXiv:2412.04449): of the context's tokens, deeper blocks process fewer and fewer."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...arguments import Range
from ..part import BlockPart, Inside
from ..precision import wide
from ..prefix import largest, targets_in


def kept_of(targets: int, keep: float) -> int:
    """How many of the targets are processed: their share, rounded down."""
    return int(keep * targets + 1e-9)


class PMoD(BlockPart):
    """A router in front of a block: which of the first tokens of a text it processes.

    The targets are the first `targets` real positions. With r = wᵀh + b and g = 1 + α tanh r, which begins as 1, the
    trunc(keep * targets) with the largest r are processed, of equal ones the first, with their own position ids, among
    themselves and with all later positions; the others go around the block and are not cached. What is multiplied by g
    is what the MLP adds to a processed target, and the whole stream of another (STRing, so that both have a gradient).
    Later positions are always processed, and never multiplied.

    A choice among all targets is not causal within them, but is for all that is behind. In a text that begins with
    fewer tokens than `targets` every block processes all of these: the paper keeps the share of however many an image
    has, all of which are there at once, whereas a short text may go on, and what came first may not depend on that.

    targets: how many first positions may be left out.
    keep: share of them that is processed, rounded down.
    gate: tanh as above; sigmoid of r and softmax of r over the targets are what it is compared with.
    symmetric: whether targets that are left out are multiplied too.
    alpha: α, how far from 1 g may be.
    """

    kind = "block.p-mod"
    paper = "arXiv:2412.04449"
    limit = "with keep = 1 and a router of zero, its start, it is the block"
    routes = True

    def __init__(
        self, width: int, *,
        targets: Annotated[int, Range(1, 2**20)] = 32, keep: Annotated[float, Range(0, 1)] = 0.5,
        gate: Literal["tanh", "sigmoid", "softmax"] = "tanh", symmetric: bool = True,
        alpha: Annotated[float, Range(0, 1)] = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.targets, self.count = targets, kept_of(targets, keep)
        self.gate, self.symmetric, self.alpha = gate, symmetric, alpha
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        assert inside.on is not None
        real, target = targets_in(x, inside, self.targets)
        if not bool(target.any()):
            return inside.on(x, real)
        r = wide(x) @ wide(self.weight) + wide(self.bias)  # B x N
        kept = largest(r, target, self.count)
        g = torch.where(target, self._gain(r, target), 1.0)
        y = inside.on(x, kept | ~target, g)
        if not self.symmetric:
            return y
        return torch.where((target & ~kept)[..., None], g[..., None].to(y.dtype) * y, y)

    def _gain(self, r: Tensor, target: Tensor) -> Tensor:
        """g (B x N) at the targets."""
        if self.gate == "tanh":
            return 1 + self.alpha * torch.tanh(r)
        if self.gate == "sigmoid":
            return torch.sigmoid(r)
        lowest = torch.finfo(r.dtype).min  # not -inf: a sequence may have no target
        return torch.softmax(r.masked_fill(~target, lowest), dim=1)

    @property
    def acts_behind(self) -> int:
        return self.targets

    @property
    def flops(self) -> int:
        return 2 * len(self.weight)
