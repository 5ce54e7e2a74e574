"""Neurons in order of what they add to the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....data import Batches
from ....statistics import FeatureNorm, Progress, collect, key_of
from .widths import mlps_of


@torch.no_grad()
def importances(anatomy: Anatomy, data: Batches, progress: Progress | None = None) -> list[Tensor]:
    """Of each block, (neurons): a neuron's root mean square on the data times the norm of its column in down."""
    rms, mlps = FeatureNorm(power=2), mlps_of(anatomy)
    statistics = collect(anatomy, data, [rms], [mlp.down for mlp in mlps], progress=progress)
    return [
        statistics.value(key_of(mlp.down, rms), rms).cpu() * mlp.down.weight.double().norm(dim=0).cpu() for mlp in mlps
    ]


def sort_neurons(anatomy: Anatomy, data: Batches, progress: Progress | None = None) -> None:
    """Put the neurons of every MLP in falling order of importance, in place; the model computes what it did."""
    found = importances(anatomy, data, progress)
    for mlp, importance in zip(mlps_of(anatomy), found, strict=True):
        mlp.keep(importance.sort(descending=True, stable=True).indices.tolist())
