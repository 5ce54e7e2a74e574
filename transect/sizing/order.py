"""The best units first, so that leading slices are the best ones. What the model computes stays the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..anatomy import Matrix
from ..compression.calibrate import calibrate
from ..data import Batches
from ..statistics import FeatureNorm, Progress, key_of
from .space import Space


def sort_units(space: Space, data: Batches, progress: Progress | None = None) -> None:
    """Put the units of every searched axis in order of what they add to the residual stream on this data, in place.

    A neuron or head adds (Σ_j E x_j² ||W_:,j||²)^½, with W the matrix behind it and j its inputs there; an entry of the
    stream counts by the weights that write it. Blocks keep their places: depth is cut from the end.
    """
    anatomy = space.anatomy
    searched = {name.rpartition(".")[2] for name in space.axes}
    roles = [role for what, role in (("heads", "o"), ("neurons", "down")) if what in searched]
    outputs = anatomy.matrices(roles) if roles else []
    rms = FeatureNorm(power=2)
    statistics = calibrate(anatomy, outputs, [rms], data, progress=progress) if outputs else None
    for matrix in outputs:
        assert statistics is not None
        energy = (matrix.weight.double() * statistics.value(key_of(matrix, rms), rms)).square().sum(0)
        if matrix.role == "down":
            mlp: Any = anatomy.blocks[matrix.block.index].mlp
            mlp.keep(_falling(energy))
        else:
            _sort_heads(matrix, energy)
    if "hidden" in searched:
        _sort_stream(space)


def _falling(score: Tensor) -> Tensor:
    return score.sort(descending=True, stable=True).indices.cpu()


def _sort_heads(output: Matrix, energy: Tensor) -> None:
    """Key/value heads with their queries, from the one that adds most."""
    attention = output.block.attention
    per_group = attention.heads // attention.key_value_heads
    groups = _falling(energy.view(attention.key_value_heads, -1).sum(1)).tolist()
    attention.keep([group * per_group + i for group in groups for i in range(per_group)])


@torch.no_grad()
def _sort_stream(space: Space) -> None:
    model = space.anatomy.model
    spans = [(name, span) for name, found in space.spans.items() for span in found if span.axis == "hidden"]
    writing = {matrix.module.weight for matrix in space.anatomy.matrices(["o", "down"])}
    writing.add(space.anatomy.embedding.weight)
    energy = torch.zeros(space.axes["hidden"].most, dtype=torch.float64)
    for name, span in spans:
        parameter = model.get_parameter(name)
        if any(parameter is one for one in writing):
            energy += parameter.detach().double().transpose(0, span.dim).flatten(1).square().sum(1).cpu()
    order = _falling(energy)
    for name, span in spans:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.index_select(span.dim, order.to(parameter.device)))
