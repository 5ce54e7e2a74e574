"""Binary codes that keep similarities: kernel supervised hashing, by heads.

A unit vector z is compared with m anchors u, κ_j = exp(-|z - u_j|² / (2 s)), and its code of b bits is the sign of
A (κ - μ). What tokens stand in a batch does not change a code: s and μ belong to the hash.
Shapes: tokens z (... h x N x d), anchors (h x m x d), mean μ (h x m), projection A (h x b x m), codes (... h x N x b).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import TransectError

_MOMENTUM = 0.9
_POSITIONS = 512  # of a sequence, between which similarities are learned


@dataclass(frozen=True)
class Hash:
    """anchors, spread (h: s of each head), mean and projection; see above."""

    anchors: Tensor
    spread: Tensor
    mean: Tensor
    projection: Tensor


def squared_distances(z: Tensor, anchors: Tensor) -> Tensor:
    """|z_i - u_j|² (... h x N x m)."""
    sizes = z.square().sum(-1)[..., :, None] + anchors.square().sum(-1)[..., None, :]
    return (sizes - 2 * z @ anchors.mT).clamp(min=0)


def anchor_kernel(z: Tensor, anchors: Tensor, spread: Tensor) -> Tensor:
    """κ (... h x N x m)."""
    return (squared_distances(z, anchors) / (-2 * spread[:, None, None])).exp()


def binary_codes(scores: Tensor) -> Tensor:
    """-1 where a score is negative, else 1; the gradient goes straight through where |score| < 1, and nowhere else."""
    through = torch.where(scores.abs() < 1, scores, scores.detach())
    return torch.where(scores < 0, -1.0, 1.0).to(scores.dtype) + (through - through.detach())


def codes_of(z: Tensor, hashed: Hash) -> Tensor:
    """H (... h x N x b) of unit vectors."""
    centred = anchor_kernel(z, hashed.anchors, hashed.spread) - hashed.mean[:, None]
    return binary_codes(centred @ hashed.projection.mT)


def random_hash(heads: int, size: int, anchors: int, bits: int, seed: int = 0) -> Hash:
    """A hash for unit vectors of which nothing is known: anchors of all directions, and A ~ N(0, 1)."""
    draw = torch.Generator().manual_seed(seed)

    def units(count: int) -> Tensor:
        return functional.normalize(torch.randn(heads, count, size, generator=draw, device="cpu"), dim=-1)

    chosen = units(anchors)
    spread = torch.full((heads,), 2.0, device="cpu")  # the mean of |z - u|² over directions
    mean = anchor_kernel(units(1024), chosen, spread).mean(-2)
    return Hash(chosen, spread, mean, torch.randn(heads, bits, anchors, generator=draw, device="cpu"))


def similarity_labels(z: Tensor, similar: int) -> Tensor:
    """Y (... N x N): 1 for each token's `similar` most similar ones, -1 for as many least similar ones, else 0.

    Of unit vectors these are the largest and smallest products. Y is made symmetric, as the products of codes are.
    """
    if z.shape[-2] <= 2 * similar:
        raise TransectError(
            f"to learn codes, {similar} similar and {similar} other tokens are told apart for each: that takes more "
            f"than {2 * similar} tokens in a sequence, and there are {z.shape[-2]}"
        )
    alike = z @ z.mT
    labels = torch.zeros_like(alike)
    labels.scatter_(-1, alike.topk(similar, -1).indices, 1.0)
    labels.scatter_(-1, alike.topk(similar, -1, largest=False).indices, -1.0)
    return (labels + labels.mT) / 2


def learned_projection(
    centred: Tensor, labels: Tensor, projection: Tensor, steps: int = 100, rate: float = 5e-4
) -> Tensor:
    """A (h x b x m) whose codes' products, over b, are near the labels: one bit after the other, from `projection`.

    centred: κ - μ (S x h x N x m) of S sequences. labels: Y (S x h x N x N). Bit r lowers the mean of
    -yᵀ R y / (N b) over sequences and heads, where R = b Y - Σ_{s<r} y_s y_sᵀ is what the bits before leave: first with
    tanh for the sign, by `steps` of Nesterov's descent; then each head takes its new row if that is better with signs.
    """
    heads, bits, _ = projection.shape
    size = centred.shape[-2] * bits * heads
    residual, rows = bits * labels, []
    for bit in range(bits):
        old = new = projection[:, bit]
        speed = torch.zeros_like(old)
        for _ in range(steps):
            y = torch.tanh(centred @ new[:, :, None] / 2)
            gradient = -(centred.mT @ ((1 - y.square()) * (residual @ y))).squeeze(-1).mean(0) / size
            speed = _MOMENTUM * speed + gradient
            new = new - rate * (gradient + _MOMENTUM * speed)
        better = hard_losses(centred, residual, new, bits) < hard_losses(centred, residual, old, bits)
        rows.append(torch.where(better[:, None], new, old))
        y = binary_codes(centred @ rows[-1][:, :, None])
        residual = residual - y @ y.mT
    return torch.stack(rows, dim=1)


def hard_losses(centred: Tensor, residual: Tensor, row: Tensor, bits: int) -> Tensor:
    """-yᵀ R y / (N b) with y the signs for a row (h x m) of each head's A, the mean over sequences: h."""
    y = binary_codes(centred @ row[:, :, None])
    return -(y.mT @ residual @ y).flatten(2).squeeze(-1).mean(0) / (centred.shape[-2] * bits)


@torch.no_grad()
def learned_hash(
    z: Tensor, anchors: int = 25, bits: int = 16, *, similar: int = 10, steps: int = 100, rate: float = 5e-4,
    seed: int = 0,
) -> Hash:  # fmt: skip
    """The hash of unit vectors z (S x h x N x d), learned from what is similar among them.

    Anchors are tokens of z, and s and μ means over all of them. Memory is S h N²: of sequences of more than 512 tokens,
    or 4 * similar where that is more, so many are drawn, among which those that are similar are looked for. Raises
    TransectError where there are too few tokens.
    """
    tokens = z.transpose(0, 1).flatten(1, 2)  # h x S N x d
    if tokens.shape[1] < anchors:
        raise TransectError(f"{anchors} anchors are drawn from the tokens, and there are {tokens.shape[1]}")
    draw = torch.Generator().manual_seed(seed)
    chosen = tokens[:, torch.randperm(tokens.shape[1], generator=draw)[:anchors].to(z.device)]
    spread = squared_distances(tokens, chosen).mean((1, 2))
    mean = anchor_kernel(tokens, chosen, spread).mean(1)
    start = torch.randn(z.shape[1], bits, anchors, generator=draw).to(z)
    if z.shape[-2] > (most := max(_POSITIONS, 4 * similar)):
        z = z[:, :, torch.randperm(z.shape[-2], generator=draw)[:most].to(z.device)]
    centred = anchor_kernel(z, chosen, spread) - mean[:, None]
    return Hash(chosen, spread, mean, learned_projection(centred, similarity_labels(z, similar), start, steps, rate))
