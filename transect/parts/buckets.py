"""Softmax attention among positions whose vectors fall into the same bucket: Reformer and Routing Transformer.

Positions are sorted by bucket, and within a bucket by where they stand; each sees those of its own bucket that are less
than `window` places away in that order. A position later in the text comes later in its bucket, so that nothing of it
is seen by those before, whatever bucket it falls into: chunks of a fixed grid over the sorted positions, as the authors
cut them, would shift with what comes behind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import UNSEEN, joined
from .part import Around, Mixer
from .precision import wide
from .rotary import rotated
from .sparse import in_blocks, positions_of, surrounding

_ITSELF = -1e5  # a position's score with itself: it reads itself where it sees nothing else


class BucketAttention(Mixer):
    """What both share; a subclass gives the `buckets`. Queries and keys have one matrix.

    No position reads itself, unless it is alone: with one matrix it would read little else.
    """

    cost = "N log N"
    roles = {"q": "q_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(self, width: int, heads: int, head_size: int, causal: bool, window: int) -> None:
        super().__init__(causal)
        self.heads, self.head_size, self.window = heads, head_size, window
        self.q_proj, self.v_proj = (nn.Linear(width, heads * head_size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def buckets(self, q: Tensor, real: Tensor | None) -> Tensor:
        """Number of each position's bucket (rounds x B x heads x N), from q (B x heads x N x size)."""
        raise NotImplementedError

    def matched(self, q: Tensor, buckets: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, from q (B x heads x N x size)."""
        raise NotImplementedError

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, v = (wide(one(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q_proj, self.v_proj))
        q = rotated(q, around.rotary)
        with torch.autocast(q.device.type, enabled=False):
            buckets = self.buckets(q.detach(), around.real)
            q, k = self.matched(q, buckets, around.real)
            if around.real is not None:  # padding has a bucket of its own
                buckets = buckets.masked_fill(~around.real[:, None], int(buckets.max()) + 1)
            y = within_buckets(q * self.head_size**-0.5, k, v, buckets, self.window, self.causal)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))


def within_buckets(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, window: int, causal: bool) -> Tensor:
    """Softmax over all that a position sees in any round, each counted once (B x heads x N x size).

    q, k, v: B x heads x N x size, q scaled. buckets: rounds x B x heads x N.
    """
    rounds, count = len(buckets), q.shape[2]
    window = min(window, count)  # of what is there
    ahead = 0 if causal else window
    order = buckets.argsort(dim=-1, stable=True)
    places = torch.arange(count, device=q.device)
    rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))  # place of each position in the order
    codes = (rank + buckets * (count + window)).to(torch.int32)  # nearer than the window: near in the same bucket
    exists = positions_of(count, window, window, ahead, q.device)
    exists = ((exists >= 0) & (exists < count))[:, None]

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        """Of numbers in the order of a round (B x heads x N), those of each block's queries and of their keys."""
        return in_blocks(x[..., None], window), surrounding(x[..., None], window, window, ahead).mT

    pieces = []
    for number, here in enumerate(order):
        sorted_q, sorted_k, sorted_v = (one.take_along_dim(here[..., None], dim=2) for one in (q, k, v))
        near = [a.sub(b).abs() < window for a, b in map(pairs, codes.take_along_dim(here[None], dim=-1))]
        i, j = pairs(here.to(torch.int32))
        seen = near.pop(number) & exists & ((j <= i) if causal else True)
        scores = in_blocks(sorted_q, window) @ surrounding(sorted_k, window, window, ahead).mT
        scores = scores.masked_fill(i == j, _ITSELF).masked_fill(~seen, UNSEEN)
        if near:  # what is seen in other rounds too has its weight from each
            scores = scores - torch.stack(near).sum(0).to(scores.dtype).log1p()
        y, total = scores.softmax(-1) @ surrounding(sorted_v, window, window, ahead), scores.logsumexp(-1, keepdim=True)
        back = rank[number][..., None]
        pieces.append(tuple(one.flatten(2, 3).take_along_dim(back, dim=2) for one in (y, total)))
    return joined(pieces) if rounds > 1 else pieces[0][0]
