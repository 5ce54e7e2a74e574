"""Routing Transformer (Roy et al., TACL 2021, arXiv:2003.05997): attention within clusters."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ..buckets import BucketAttention


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
