"""Queries and keys as one matrix a head (QKR): no quantized query meets a quantized key.

X_q M_h X_qᵀ with M_h = W_q,hᵀ W_k,h is what attention takes the softmax of, up to its scale. It stands here by itself:
its form, d x d numbers a head, fits no attention layer of transformers, whose heads are of one width. It is
mathematics for models whose queries and keys have no bias, no norm and no rotary position: those of the paper without
their biases, MPT, T5, and GPT-2 or BERT where the biases of queries and keys are zero.
"""

from __future__ import annotations

from torch import Tensor

from ..straight_through import straight_through
from .quantizers import from_boundary, statistic, stats_positions, statsq


def merged(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """M_h (heads x d x d) of W_q and W_k (heads d_h x d), of rank d_h at most."""
    by_head = [weight.unflatten(0, (heads, -1)) for weight in (query, key)]
    return by_head[0].mT @ by_head[1]


def quantized_merged(query: Tensor, key: Tensor, heads: int, bits: int, boundary: float | None = None) -> Tensor:
    """M_h of each head, row by row in `bits` bits. W_q and W_k stay what is trained, through the product.

    boundary: in annealing, entries of M_h that are further than this from a boundary between levels pass no gradient.
    """
    whole = merged(query, key, heads)
    rows, mask = whole.flatten(0, 1), None
    if boundary is not None:
        mask = from_boundary(stats_positions(rows, statistic(rows), bits), bits) <= boundary
    return straight_through(rows, statsq(rows.detach(), bits), mask).view_as(whole)


def scores(x: Tensor, merged_heads: Tensor) -> Tensor:
    """X M_h Xᵀ (batch x heads x N x N) of X (batch x N x d), without a scale: rows are queries."""
    return x[:, None] @ (merged_heads @ x.mT[:, None])
