"""Rates by layer of a model that is being adapted: the weights as they are now, and whose numbers are whose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..anatomy.storage import is_dense, read_weight
from ..forward import at_rest
from ..training import Problem, layer_rates_named
from .settings import Settings
from .targets import Shape


def renew_rates(problem: Problem, settings: Settings, model: Any, layers: Mapping[str, Shape]) -> None:
    """Let the problem's learning rates follow the settings' rates by layer.

    model: with whatever is trained on it. layers: (d_out, d_in) of its linear layers by path, from before anything was
    attached; those of which nothing is trained have no say. To a layer belong its weight and all that an adapter has
    put there, but not its bias; everything else has the plain rate.
    """
    assert settings.layer_rates is not None
    factors = layer_rates_named(settings.layer_rates).function(**settings.layer_rates_options)
    owned: dict[str, list[str]] = {}
    for path in layers:
        inside = [name for name in problem.parameters if name.startswith(f"{path}.") and not name.endswith(".bias")]
        if inside:
            owned[path] = inside

    def renew() -> dict[str, float]:
        merges = settings.way.merges
        found = factors.of({path: weight_now(model.get_submodule(path), layers[path][1], merges) for path in owned})
        return {name: factor for path, factor in found.items() for name in owned[path]}

    problem.renew, problem.renew_every = renew, factors.every


@torch.no_grad()
def weight_now(layer: Any, inputs: int, merges: bool = True) -> Tensor:
    """W (d_out x d_in) of a linear layer, with what an adapter makes of it: its outputs for unit vectors.

    inputs: d_in. merges: whether the adapter is a change of the weight. Of one that is not, the weight below it.
    """
    whole: Any = layer if merges or not isinstance(layer, BaseTunerLayer) else layer.get_base_layer()
    if is_dense(whole):
        return read_weight(whole)
    like = next(whole.parameters())
    with at_rest(whole):
        units = torch.eye(inputs, dtype=like.dtype, device=like.device)
        return (whole(units) - whole(torch.zeros_like(units[:1]))).T
