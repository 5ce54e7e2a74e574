"""How many MLP neurons are active for a token, and which: sums over tokens, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ....anatomy import Block
from ....forward import Seen
from ...places import wide

MEASURES = ("exact", "above", "mass")
BUCKETS = 16
PLACES = ["0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, BUCKETS - 2)), f"{2 ** (BUCKETS - 2)} on"]


def rectifies(block: Block) -> bool:
    """Whether the MLP's activation function makes negative numbers exactly zero, as a ReLU does."""
    if block.mlp is None or block.mlp.activation is None:
        return False
    below = -torch.logspace(-2, 0, 9)[:, None].expand(
        -1, block.mlp.neurons
    )  # a trained function has one of each neuron
    with torch.no_grad():
        return not bool(block.mlp.activation(below).any())


def shaped(seen: Seen, layer: int) -> Tensor:
    """Activations (B x T x n), also where the model has flattened batch and positions."""
    found = seen.neurons[layer]
    return found.reshape(*seen.residual[layer].shape[:2], found.shape[-1])


class Tally:
    """Sums over tokens for one layer of n neurons.

    sharp: exact zeros decide what is active; else `share` of the token's largest.
    fired: n, tokens for which each neuron was active. counts: histogram of the number of active neurons (n + 1).
    """

    def __init__(self, neurons: int, sharp: bool, share: float) -> None:
        self.neurons, self.sharp, self.share = neurons, sharp, share
        self.tokens = 0.0
        self.sums = torch.zeros(len(MEASURES), dtype=torch.float64)
        self.fired = torch.zeros(neurons, dtype=torch.float64)
        self.counts = torch.zeros(neurons + 1, dtype=torch.float64)
        self.place_sums, self.place_counts = (torch.zeros(BUCKETS, dtype=torch.float64) for _ in range(2))

    def add(self, activations: Tensor, place: Tensor) -> None:
        """activations: B x T x n. place: B x T, -1 where a position does not count."""
        counted = place >= 0
        a, place = wide(activations[counted]).abs(), place[counted].cpu()
        exact, above = a > 0, a > self.share * a.amax(-1, keepdim=True)
        active = exact if self.sharp else above
        number = active.sum(-1).cpu()
        self.tokens += len(a)
        self.sums += torch.tensor(
            [float(exact.sum()), float(above.sum()), float(mass_counts(a).sum())], dtype=torch.float64
        )
        self.fired += active.sum(0).cpu()
        self.counts += number.bincount(minlength=self.neurons + 1)
        power = place.clamp_min(1).double().log2().floor().long() + 1
        bucket = power.clamp_max(BUCKETS - 1) * (place > 0)
        self.place_sums.index_add_(0, bucket, number.double() / self.neurons)
        self.place_counts.index_add_(0, bucket, torch.ones(len(a), dtype=torch.float64))

    @property
    def density(self) -> Tensor:
        """Mean share of the neurons that are active, as in MEASURES (3)."""
        return (self.sums / (self.tokens * self.neurons)).float()

    def natural(self) -> int:
        """The smallest k that 99 % of the tokens do not exceed, at least 1."""
        share = self.counts.cumsum(0) / self.counts.sum()
        return max(int((share >= 0.99 - 1e-12).int().argmax()), 1)


def mass_counts(sizes: Tensor, mass: float = 0.95) -> Tensor:
    """The fewest entries of |a| (tokens x n) that hold that share of a token's sum; 0 where all are zero."""
    ordered = sizes.sort(-1, descending=True).values.cumsum(-1)
    total = ordered[:, -1:]
    return ((ordered < mass * total).sum(-1) + 1) * (total[:, 0] > 0)
