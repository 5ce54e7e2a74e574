"""Narrower heads: which query/key channels to keep, and the best low-rank pair of a value and an output matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def output_power(weight: Tensor, bias: Tensor | None, covariance: Tensor, mean: Tensor) -> Tensor:
    """E[y_i²] (d_out) of y = Wx + b, from E[x xᵀ] (d_in x d_in) and E[x] (d_in)."""
    power = ((weight @ covariance) * weight).sum(1)
    if bias is not None:
        power = power + 2 * bias * (weight @ mean) + bias.square()
    return power.clamp_min(0)


def strongest_channels(power: Tensor, rotary: int, count: int, neighbours: bool = False) -> Tensor:
    """The `count` channels of each head (heads x count, ascending) with the largest summed power.

    power: (heads x head_size), non-negative. rotary: of a head's first `rotary` channels, i and i + rotary/2 are one
    pair, kept or dropped together, or 2i and 2i + 1 if `neighbours`; the rest are single. Where there are only pairs,
    `count` must be even.
    """
    if neighbours:
        order = torch.arange(power.shape[1], device=power.device)
        order[:rotary] = order[:rotary].view(-1, 2).T.flatten()  # as if they were halves
        return order[strongest_channels(power[:, order], rotary, count)].sort(dim=1).values
    half = rotary // 2
    pairs, pair_order = (power[:, :half] + power[:, half:rotary]).sort(dim=1, descending=True, stable=True)
    singles, single_order = power[:, rotary:].sort(dim=1, descending=True, stable=True)
    fewest = max(0, -((singles.shape[1] - count) // 2))  # pairs that must be kept as there are not enough singles
    options = torch.arange(fewest, min(half, count // 2) + 1, device=power.device)
    worth = _sums(pairs)[:, options] + _sums(singles)[:, count - 2 * options]
    chosen = []
    for head, number in enumerate(options[worth.argmax(1)].tolist()):
        first = pair_order[head, :number]
        rest = single_order[head, : count - 2 * number] + rotary
        chosen.append(torch.cat([first, first + half, rest]).sort().values)
    return torch.stack(chosen)


def _sums(ranked: Tensor) -> Tensor:
    """Sum of the first 0, 1 ... n numbers of each row."""
    return torch.cat([ranked.new_zeros(len(ranked), 1), ranked.cumsum(1)], dim=1)


def narrower_values(values: Tensor, outputs: Tensor, covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """V' (heads x count x d_in) and O' (heads x d x count) with E||O V x - O' V' x||² least, head by head.

    values: V (heads x head_size x d_in). outputs: O (heads x d x head_size), d may be that of several matrices on top
    of one another which read the same values. covariance: C = E[x xᵀ]. The error is Σ_{i > count} σ_i(O V C^½)².

    With V C^½ = E Λ^½ Qᵀ, where E Λ Eᵀ = V C Vᵀ, the problem is the SVD of the d x head_size matrix O E Λ^½ = U S Rᵀ:
    V' = R_kᵀ Λ^-½ Eᵀ V and O' = O E Λ^½ R_k. So C^½ itself (d_in x d_in) is never needed.
    """
    energy, basis = torch.linalg.eigh(values @ covariance @ values.mT)  # (heads, head_size), Λ and E
    # Relative energies give the same problem. A direction that is never excited gets a tiny one instead of none, so
    # that all channels kept is the identity; a head of which none is excited has them all alike.
    largest = energy[:, -1:]
    energy = torch.where(largest > 0, energy / largest, 1).clamp_min(1e-14)
    root = energy.sqrt()
    scaled = outputs @ (basis * root[:, None, :])  # O E Λ^½: heads x d x head_size
    right = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors.flip(-1)[..., :count]  # R_k
    return (right.mT / root[:, None, :]) @ (basis.mT @ values), scaled @ right
