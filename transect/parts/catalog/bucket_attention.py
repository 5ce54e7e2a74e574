"""Softmax attention among positions whose vectors fall into the same bucket: Reformer and Routing Transformer.

Positions are sorted by bucket, and within a bucket by where they stand; each sees those of its own bucket that are less
than `window` places away in that order. A position later in the text comes later in its bucket, so that nothing of it
is seen by those before, whatever bucket it falls into: chunks of a fixed grid over the sorted positions, as the authors
cut them, would shift with what comes behind.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ...parameters import Seed
from ..attention import UNSEEN, joined
from ..part import Around, Mixer
from ..precision import wide
from ..rotary import rotated
from .sparse_attention import in_blocks, positions_of, surrounding

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


class Reformer(BucketAttention):
    """Buckets by locality-sensitive hashing, in several rounds: argmax [x R; -x R] for random R (Section 2).

    window: how many places away, in the bucket, a position is seen.
    buckets: how many, even; 1 for none.
    rounds: of hashing, each with an R of its own; what is seen in several counts once.
    seed: of R.
    """

    kind = "mixer.reformer"
    paper = "arXiv:2001.04451"
    limit = "with one bucket and a window of all positions it is softmax attention with keys q / |q|, itself not seen"
    directions: Tensor

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, layer: int, *,
        window: Annotated[int, Range(1, 2**20)] = 64, buckets: Annotated[int, Range(1, 2**16)] = 16,
        rounds: Annotated[int, Range(1, 64)] = 2, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, window)
        if buckets > 1 and buckets % 2:
            raise TransectError(
                f"{self.kind}: a direction and its opposite are two buckets, so that {buckets} are none"
            )
        drawn = torch.empty(rounds, head_size, buckets // 2)
        if drawn.device.type != "meta":
            draw = torch.Generator().manual_seed((seed + layer) % 2**63)
            drawn.copy_(torch.randn(drawn.shape, generator=draw, device="cpu"))
        self.register_buffer("directions", drawn)

    def matched(self, q: Tensor, buckets: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        return q, functional.normalize(q, dim=-1)

    def buckets(self, q: Tensor, real: Tensor | None) -> Tensor:
        if not self.directions.shape[-1]:
            return torch.zeros(len(self.directions), *q.shape[:3], dtype=torch.long, device=q.device)
        along = torch.einsum("bhnd,rdc->rbhnc", q, self.directions.to(q.dtype))
        return torch.cat([along, -along], dim=-1).argmax(-1)

    def mixing_flops(self, length: int) -> int:
        rounds, _, half = self.directions.shape
        keys = (2 if self.causal else 3) * min(self.window, length)
        return rounds * length * self.heads * self.head_size * (2 * half + 4 * keys)


class Pulled(torch.autograd.Function):
    """Gives its first argument back; in the backward pass the second one's gradient is the third."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, centres: Tensor, pull: Tensor) -> Tensor:
        ctx.save_for_backward(pull)
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.saved_tensors[0], None


class Routing(BucketAttention):
    """Buckets by k-means: each position goes to the nearest of its head's centres, by angle (Section 4).

    The centres' gradient is that of 0.001 Σ |centre - mean of what came to it|² / 2, whatever else is lowered: under an
    optimizer that scales gradients they follow these means, where the authors keep running means. The authors let each
    centre take the same number of positions, which looks ahead; here each position takes one centre. Queries, which are
    the keys too, are normed.

    window: how many places away, in the bucket, a position is seen.
    clusters: centres of each head; best about the square root of the length.
    """

    kind = "mixer.routing"
    paper = "arXiv:2003.05997"
    limit = (
        "with one cluster and a window of all positions it is softmax attention with keys that are q, itself not seen"
    )

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *,
        window: Annotated[int, Range(1, 2**20)] = 64, clusters: Annotated[int, Range(1, 2**16)] = 16,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, window)
        self.centres = nn.Parameter(torch.randn(heads, clusters, head_size) * head_size**-0.5)

    def buckets(self, q: Tensor, real: Tensor | None) -> Tensor:
        normed = functional.layer_norm(q, q.shape[-1:])
        return (normed @ functional.normalize(self.centres.detach().to(q.dtype), dim=-1).mT).argmax(-1)[None]

    def matched(self, q: Tensor, buckets: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        normed = functional.layer_norm(q, q.shape[-1:])
        if self.centres.requires_grad and torch.is_grad_enabled():
            taken = functional.one_hot(buckets[0], self.centres.shape[1]).to(q.dtype)
            if real is not None:
                taken = taken * real[:, None, :, None]
            sums = torch.einsum("bhnc,bhnd->hcd", taken, functional.normalize(normed.detach(), dim=-1))
            counts = taken.sum(dim=(0, 2))[..., None]
            pull = 1e-3 * (self.centres.detach() - sums / counts.clamp(min=1)) * (counts > 0)
            normed = Pulled.apply(normed, self.centres, pull.to(self.centres.dtype))
        return normed, normed

    def mixing_flops(self, length: int) -> int:
        keys = (2 if self.causal else 3) * min(self.window, length)
        return length * self.heads * self.head_size * (2 * self.centres.shape[1] + 4 * keys)
