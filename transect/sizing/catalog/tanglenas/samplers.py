"""From architecture numbers α (C) to weights β (C) of the choices: a draw for a pass, and their mean.

A draw takes torch's own generator, so that a seed decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional

SamplerName = Literal["drnas", "gdas", "darts"]


@dataclass(frozen=True)
class Sampler:
    """draw: `draw(α, temperature) -> β`, with its gradient to α. mean: `mean(α) -> E β`, for the expected size."""

    draw: Callable[[Tensor, float], Tensor]
    mean: Callable[[Tensor], Tensor]


def concentration(alpha: Tensor) -> Tensor:
    """elu(α) + 1 > 0, of the Dirichlet distribution (DrNAS); 1, the flat one, at α = 0.

    In float32 e^α - 1 + 1 would round to 0 for α below -17; the floor is far below every value that is reached.
    """
    return (functional.elu(alpha) + 1).clamp_min(1e-6)


def dirichlet(alpha: Tensor, temperature: float = 1.0) -> Tensor:
    """DrNAS: a reparametrised sample; positive, sums to 1. The temperature is not used."""
    return Dirichlet(concentration(alpha)).rsample()


def dirichlet_mean(alpha: Tensor) -> Tensor:
    """Its mean."""
    values = concentration(alpha)
    return values / values.sum()


def pull(alpha: Tensor) -> Tensor:
    """KL(Dirichlet(elu(α) + 1) || Dirichlet(1)): the distance from the flat start (DrNAS)."""
    values = concentration(alpha)
    return kl_divergence(Dirichlet(values), Dirichlet(torch.ones_like(values)))


def gumbel(alpha: Tensor, temperature: float) -> Tensor:
    """GDAS: one choice, drawn by the softmax of α; the gradient is that of the Gumbel-softmax at the temperature."""
    return functional.gumbel_softmax(alpha, tau=temperature, hard=True, dim=-1)


def sparsemax(alpha: Tensor, temperature: float = 1.0) -> Tensor:
    """DARTS, entangled: the point of the simplex nearest to α (Martins and Astudillo 2016); no draw, no temperature.

    With z sorted falling, k is the largest with 1 + k z_k > Σ_{j<=k} z_j, and β = max(α - τ, 0) with
    τ = (Σ_{j<=k} z_j - 1) / k. Where β > 0, the gradient is that of β less its mean over these choices; elsewhere it
    is 0. Differentiating τ through the sum of the k largest gives just that.
    """
    falling = alpha.sort(descending=True).values
    sums = falling.cumsum(0)
    count = torch.arange(1, len(alpha) + 1, device=alpha.device)
    k = int((1 + count * falling > sums).sum())
    return (alpha - (sums[k - 1] - 1) / k).clamp_min(0)


SAMPLERS: dict[SamplerName, Sampler] = {
    "drnas": Sampler(dirichlet, dirichlet_mean),
    "gdas": Sampler(gumbel, lambda alpha: alpha.softmax(-1)),
    "darts": Sampler(sparsemax, sparsemax),
}
