"""Cutting a chosen network out of the super-network: an ordinary model, with the slices as its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..anatomy import Anatomy
from ..errors import TransectError
from .space import Picked, Space


def cut(space: Space, picked: Picked) -> Any:
    """The picked network with inherited weights. The space's model is what it is cut out of, and is gone afterwards."""
    anatomy = space.anatomy
    sizes = {name: axis.choices[picked[name]] for name, axis in space.axes.items()}
    if "hidden" in sizes and sizes["hidden"] < space.axes["hidden"].most:
        anatomy = Anatomy(narrowed(space, sizes["hidden"]), anatomy.architecture)
    for block in anatomy.blocks[: sizes.get("depth")]:
        neurons = sizes.get("neurons", sizes.get(f"blocks.{block.index}.neurons"))
        heads = sizes.get("heads", sizes.get(f"blocks.{block.index}.heads"))
        mlp: Any = block.mlp
        attention: Any = block.attention
        if neurons is not None and neurons < mlp.neurons:
            mlp.keep(range(neurons))
        if heads is not None and heads < attention.key_value_heads:
            attention.keep(range(heads * attention.heads // attention.key_value_heads))
    for index in reversed(range(sizes.get("depth", len(anatomy.block_list)), len(anatomy.block_list))):
        anatomy.drop_block(index)
    return anatomy.model


@torch.no_grad()
def narrowed(space: Space, width: int) -> Any:
    """A model of the same class whose stream has this width, with the leading slices; all else as it was."""
    anatomy = space.anatomy
    model, keys = anatomy.model, anatomy.architecture.config
    config = copy.deepcopy(model.config)
    setattr(config, keys["head_size"], anatomy.head_size)
    setattr(config, keys["hidden"], width)
    with torch.random.fork_rng(devices=[]):  # the new model's random weights are all overwritten
        new = type(model)(config).to(model.device, model.dtype)
    old = dict(model.named_parameters())
    for name, parameter in new.named_parameters():
        tensor = old[name].detach()
        for span in space.spans.get(name, []):
            if span.axis == "hidden":
                tensor = tensor.narrow(span.dim, 0, width)
        if tensor.shape != parameter.shape:
            raise TransectError(
                f"a narrower {type(model).__name__} has {name} of shape {tuple(parameter.shape)}, where a slice has "
                f"{tuple(tensor.shape)}: leave out hidden"
            )
        parameter.copy_(tensor)
    return new.train(model.training)
