"""Which neurons of a trained MLP make an expert, and a gate that guesses how much each would add."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....anatomy.grouping import alike
from ....parts.experts import SplitMLP
from ...experts import TrainedMLP

Partition = Literal["co-activation", "random", "order"]


@torch.no_grad()
def in_groups(
    mlp: TrainedMLP, groups: int, kind: Partition, generator: torch.Generator, x: Tensor | None = None
) -> Tensor:
    """The neurons in an order in which each next neurons / groups of them are an expert.

    order: as they are. random. co-activation: neurons that are active at the same positions come together: balanced
    k-means of what each adds to the output (|activation| times the length of its column of down) at the inputs x
    (n x d), by correlation (our choice; the paper cuts in order).
    """
    device, count = mlp.up.device, mlp.neurons
    if kind == "order":
        return torch.arange(count, device=device)
    if kind == "random":
        return torch.randperm(count, generator=generator).to(device)
    assert x is not None
    added = mlp.activations(x).float().abs() * mlp.down.float().norm(dim=0)
    rows = functional.normalize((added - added.mean(0)).T, dim=-1)  # neurons x n
    return alike(rows, groups, generator).argsort(stable=True)


@torch.no_grad()
def fit_router(router: nn.Linear, x: Tensor, wanted: Tensor, ridge: float = 1e-2) -> None:
    """Let the gate's scores be the linear function of x that is nearest to these (n x experts), by ridge regression.

    ridge: what is added to the diagonal, as a share of its mean.
    """
    x, wanted = x.double(), wanted.double()
    mean, middle = x.mean(0), wanted.mean(0)
    x = x - mean
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (wanted - middle)).T
    router.weight.copy_(weight)
    if router.bias is not None:
        router.bias.copy_(middle - weight @ mean)


@torch.no_grad()
def lengths_added(split: SplitMLP, x: Tensor) -> Tensor:
    """How long a vector each group adds (n x groups) at these inputs, relative to the groups' mean."""
    lengths = torch.stack([split.one(number, x).float().norm(dim=-1) for number in range(split.groups)], dim=-1)
    return lengths / lengths.mean(-1, keepdim=True).clamp_min(1e-30)
