"""Softmax attention over few of the positions, chosen by where they are: what its patterns share.

A pattern is said twice: as a rule, `sees`, by which generation picks the keys that it reads, and as blocks of keys that
are gathered for all queries at once. No N x N tensor is made in either. Positions are counted over what is real, so
that padding, wherever it stands, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import Range
from .attention import Attention, with_past
from .part import Around

Window = Annotated[int, Range(1, 2**20)]
Few = Annotated[int, Range(0, 2**16)]


class SparseAttention(Attention):
    """What all of them share; a subclass gives the pattern as `sees` and computes it in `gathered`.

    In generation all keys and values are kept, and those that no query sees are not read.
    """

    recurrent = True  # though its state grows

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        """Whether a query at one position sees a key at another, of `count` positions; causality aside."""
        raise NotImplementedError

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """What is read (B x heads x N x size). real: which keys may be (1 or B x N); they are the first ones."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        real, state = around.real, around.state
        if state is not None:
            begun = bool(state)
            so_far = with_past(k, v, real, state)
            if begun:
                return self._go_on(q, *so_far)
        if real is None or bool(real.all()):
            return self.gathered(q, k, v, k.new_ones(1, k.shape[2], dtype=torch.bool))
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # what is real comes first
        q, k, v = (one.take_along_dim(order[:, None, :, None], dim=2) for one in (q, k, v))
        y = self.gathered(q, k, v, real.take_along_dim(order, dim=1))
        return y.take_along_dim(order.argsort(dim=1)[:, None, :, None], dim=2)

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """Attention of the last positions' queries to all so far; what none of them sees is not read."""
        real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if real is None else real
        number = real.cumsum(dim=1) - 1
        at = number[:, -q.shape[2] :, None]
        mask = self.sees(at, number[:, None], k.shape[2]) & real[:, None]
        if self.causal:
            mask &= number[:, None] <= at
        index = torch.arange(k.shape[2], device=q.device)
        mask |= index == index[-q.shape[2] :, None]
        chosen = mask.any(dim=0).any(dim=0).nonzero()[:, 0]
        return functional.scaled_dot_product_attention(
            q, k[:, :, chosen], v[:, :, chosen], attn_mask=mask[:, None, :, chosen]
        )

    def _behind(self, at: Tensor, keys: Tensor) -> Tensor:
        """Keys that causality lets a query see."""
        return keys <= at if self.causal else torch.ones_like(keys <= at)

    @property
    def _inner(self) -> int:
        return self.heads * self.head_size


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Positions in blocks, padded behind: ... x N x d -> ... x blocks x size x d."""
    return functional.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def surrounding(x: Tensor, size: int, before: int, behind: int) -> Tensor:
    """Each block with so many positions on its sides: ... x N x d -> ... x blocks x (before + size + behind) x d."""
    whole = functional.pad(x, (0, 0, before, behind + -x.shape[-2] % size))
    return whole.unfold(-2, before + size + behind, size).mT


def positions_of(count: int, size: int, before: int, behind: int, device: torch.device) -> Tensor:
    """The positions that `surrounding` gathers for `count` of them (blocks x wide); some are below 0 or too large."""
    first = torch.arange(0, count, size, device=device)
    return first[:, None] + torch.arange(-before, size + behind, device=device)


def real_at(real: Tensor, at: Tensor) -> Tensor:
    """Which of the positions (blocks x wide) exist and are real (1 or B x blocks x wide)."""
    return real[:, at.clamp(0, real.shape[1] - 1)] & (at >= 0) & (at < real.shape[1])


def everywhere(keys: Tensor, blocks: int) -> Tensor:
    """The same keys for each block: B x heads x n x d -> B x heads x blocks x n x d."""
    return keys.unsqueeze(2).expand(-1, -1, blocks, -1, -1)


def blocked(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys: Tensor, allowed: Tensor, seen: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of blocks of queries, each to keys of its own (B x heads x (blocks of N) x size).

    q: B x heads x N x size. k, v: B x heads x blocks x n x size. at: positions of the queries (blocks x block).
    keys: of the keys (blocks x n). allowed: which keys may be seen by any (1 or B x blocks x n). seen: of positions of
    queries and keys, which see one another. A query that would see nothing sees itself.
    """
    at, keys = at[:, :, None], keys[:, None]
    mask = seen(at, keys) & allowed[:, :, None]
    mask = mask | (at == keys) & ~mask.any(-1, keepdim=True)
    # Blocks go to the batch: torch's fused kernels take no fifth dimension.
    mask = mask.expand(len(q), -1, -1, -1).flatten(0, 1)[:, None]
    folded = (one.transpose(1, 2).flatten(0, 1) for one in (in_blocks(q, at.shape[1]), k, v))
    y = functional.scaled_dot_product_attention(*folded, attn_mask=mask)
    return y.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)
