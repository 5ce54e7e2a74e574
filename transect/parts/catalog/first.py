"""FiRST (Jain et al., Findings of EMNLP 2025, arXiv:2410.12513): blocks that a text skips, by its beginning."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ..part import BlockPart, Inside
from ..precision import wide
from ..prefix import numbered, settle, settled


class First(BlockPart):
    """A router in front of a block: whether a sequence skips it behind its beginning.

    ρ is the mean of sigmoid(wᵀh / |h| + b) over the stream h at the first `prompt` real positions; to divide by the
    length is ours. All later positions of the sequence run the block if ρ is above the threshold, and else pass it by:
    nothing is computed, and nothing is cached.
    The first positions run all blocks, so that no position knows of what is behind it, whether the text comes at once
    or token by token (our design: in the paper the whole prompt decides, which a text that is only read has not).
    A text no longer than `prompt` runs all blocks.

    In training later positions get h + g (block(h) - h). As the paper's formula is quoted, ρ cancels out of it; this is
    our reading. ρ is left in `auxiliary`, as the penalty of not skipping. With `hard` set, blocks are skipped in
    training as they are afterwards.

    prompt: how many first positions of a sequence decide.
    start: b at the beginning, w is 0 then.
    gate: g is ρ itself (soft), or 1 or 0 as it is afterwards, with the gradient of ρ (straight-through).
    """

    kind = "block.first"
    paper = "arXiv:2410.12513"
    limit = "where ρ is above the threshold it is the block; nothing is skipped at the start"
    routes = True

    threshold: Tensor

    def __init__(
        self, width: int, *,
        prompt: Annotated[int, Range(1, 2**20)] = 32, start: Annotated[float, Range(-100, 100)] = 3.0,
        gate: Literal["soft", "straight-through"] = "straight-through",
    ) -> None:  # fmt: skip
        super().__init__()
        self.prompt, self.gate, self.hard = prompt, gate, False
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.full((1,), start))
        self.register_buffer("threshold", torch.tensor([0.5]))
        self.decided: list[Tensor] | None = None  # where one is set, ρ of every sequence that is long enough goes there

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        assert inside.on is not None
        known = settled(inside)
        if known is not None and not self.training and self.decided is None:
            return inside.on(x, known[:, None].expand(x.shape[:2]))
        real, number = numbered(x, inside)
        later = number >= self.prompt
        rho = self._mean(x, real & ~later, inside)
        long = number[:, -1] + 1 >= self.prompt  # (B): decided
        if self.decided is not None:
            self.decided.append(rho[later.any(1)].detach())
        runs = rho > self.threshold
        if self.training and not self.hard:
            g = rho if self.gate == "soft" else runs.to(rho.dtype) + rho - rho.detach()
            self.__dict__["auxiliary"] = rho[later.any(1)].mean() if bool(later.any()) else None
            y = inside.on(x, torch.ones_like(real))
            return torch.where(later[..., None], x + g[:, None, None].to(x.dtype) * (y - x), y)
        y = inside.on(x, ~later | runs[:, None])
        if inside.forget is not None:
            inside.forget(long & ~runs)
        settle(inside, long, runs)
        return y

    def _mean(self, x: Tensor, deciding: Tensor, inside: Inside) -> Tensor:
        """ρ (B) of the deciding positions so far; x: (B x N x d), deciding: (B x N)."""
        direction = functional.normalize(wide(x), dim=-1)  # massive activations would turn a router in a single step
        p = torch.sigmoid(direction @ wide(self.weight) + wide(self.bias))
        total, count = (p * deciding).sum(1), deciding.sum(1)
        if inside.state is not None:
            for name, now in (("total", total), ("deciding", count)):
                inside.state[name] = inside.state[name] + now if name in inside.state else now
            total, count = inside.state["total"], inside.state["deciding"]
        return total / count.clamp_min(1)

    @property
    def acts_behind(self) -> int:
        return self.prompt

    @property
    def flops(self) -> int:
        return 2 * len(self.weight)
