"""What config.json can say of a changed model: all of it (a plain checkpoint), or the sizes layer by layer."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, Experts, StructureRecord
from ..errors import UnknownArchitecture
from .modeling_file import concrete_class

STRUCTURE_KEYS = ("per_layer_config", "allow_global_per_layer_attribute_access", "quantization_config")


def plain_config(model: Any) -> dict[str, Any]:
    """The model's config as JSON, without what Transect has put in it."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in STRUCTURE_KEYS}


def skeleton(model: Any, edits: dict[str, Any]) -> Any:
    """What transformers alone would build from the config with these edits, on the meta device."""
    config = {**plain_config(model), **{key: value for key, value in edits.items() if key not in STRUCTURE_KEYS}}
    with init.no_init_weights(), torch.device("meta"):
        return concrete_class(model)(type(model.config).from_dict(config))


def store_as_conv1d(record: StructureRecord, plain: Any, state: dict[str, Tensor]) -> None:
    """Let `record` and `state` hold as `Conv1D` what is an `nn.Linear` in place of one.

    A square matrix would otherwise have the same shape in both, and be read transposed without anybody noticing.
    """
    for path, entry in record.modules.items():
        weight = state.get(f"{path}.weight")
        if weight is None or weight.device.type == "meta" or weight.numel() == 0:  # offloaded; empty ones stay Linear
            continue
        if entry["kind"] == "linear" and isinstance(module_at(plain, path), Conv1D):
            state[f"{path}.weight"] = weight.T
            state.setdefault(f"{path}.bias", weight.new_zeros(entry["out"]))
            record.modules[path] = {"kind": "conv1d", "in": entry["in"], "out": entry["out"], "bias": True}


def fits(plain: Any, record: StructureRecord, state: dict[str, Tensor]) -> bool:
    """Whether the plain skeleton is the recorded model: the same modules, attributes and shapes, and nothing tied."""
    if record.tied:
        return False
    kinds = {"linear": nn.Linear, "conv1d": Conv1D}
    for path, entry in record.modules.items():
        if entry["kind"] not in kinds or not isinstance(module_at(plain, path), kinds[entry["kind"]]):
            return False
    for path, attributes in record.attributes.items():
        for attribute, value in attributes.items():
            if module_at(plain, f"{path}.{attribute}") != value:
                return False
    return {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in state.items()}


def stops(plain: Any, state: dict[str, Tensor]) -> bool:
    """Whether the shape of some tensor would stop a transformers that loads `state` into the plain skeleton."""
    shapes = plain.state_dict()
    return any(name in shapes and shapes[name].shape != tensor.shape for name, tensor in state.items())


def sizes_in_config(model: Any, plain: Any) -> dict[str, Any]:
    """What to change in config.json: sizes that all layers share as usual, the others in `per_layer_config`."""
    try:
        anatomy, now, was = Anatomy(model, weights=False), _sizes(model), _sizes(plain)
    except UnknownArchitecture:  # it was described in another process, and its record replayed in this one
        return {}
    of_experts = {anatomy.architecture.config.get(name) for name in ("experts", "chosen_experts")}
    of_experts = {anatomy.config.attribute_map.get(name, name) for name in of_experts}
    shared: dict[str, Any] = {}
    per_layer: dict[str, dict[str, Any]] = {}
    for key in sorted({key for a, b in zip(now, was, strict=True) for key in a if a[key] != b.get(key)}):
        values = [sizes.get(key) for sizes in now]
        if key in of_experts:  # blocks without experts do not read it
            values = [value for value in values if value is not None]
        if key != "skip" and len(set(values)) == 1:
            shared[key] = values[0]
            if key == anatomy.architecture.config.get("heads"):
                shared[anatomy.architecture.config["head_size"]] = anatomy.head_size
        else:
            for layer, value in enumerate(sizes.get(key) for sizes in now):
                if value is not None and value != was[layer].get(key):
                    per_layer.setdefault(str(layer), {})[key] = value
    # Some configs refuse a number of heads that does not divide the width, or any that differs by layer.
    heads = {anatomy.architecture.config.get(name) for name in ("heads", "key_value_heads", "head_size")}
    inside = next((key for key, value in vars(model.config).items() if value is anatomy.config), None)
    for refused in (set(), heads):
        table = {layer: _without(sizes, refused) for layer, sizes in sorted(per_layer.items())}
        table = {layer: sizes for layer, sizes in table.items() if sizes}
        edits = {**_without(shared, refused), **({"per_layer_config": table} if table else {})}
        if inside is not None:  # the config of a language model within another; there the record says it layer by layer
            edits = {inside: {**plain_config(model)[inside], **_without(shared, refused)}} if shared else {}
        if _readable(model, edits):
            return edits
    return {}


def _without(sizes: dict[str, Any], keys: set[Any]) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if key not in keys}


def _sizes(model: Any) -> list[dict[str, Any]]:
    """Per layer, config key -> size; `skip` lists the sublayers that were dropped."""
    anatomy = Anatomy(model, weights=False)
    keys = anatomy.architecture.config
    table = []
    for block in anatomy.blocks:
        sizes: dict[str, Any] = {}
        attention, mlp = block.attention, block.mlp
        if isinstance(mlp, Experts):
            for name, value in (("experts", len(mlp.experts)), ("chosen_experts", mlp.chosen)):
                sizes[anatomy.config.attribute_map.get(keys[name], keys[name])] = value
        elif mlp is not None and "neurons" in keys:
            sizes[keys["neurons"]] = mlp.neurons
        # Elsewhere the config's number of heads also sets their size, which has not changed.
        if attention is not None and anatomy.architecture.head_size_is_configurable:
            sizes[keys["heads"]] = attention.heads
            if "key_value_heads" in keys:
                sizes[keys["key_value_heads"]] = attention.key_value_heads
        dropped = [name for name, unit in (("attention", attention), ("mlp", mlp)) if unit is None]
        table.append({**sizes, "skip": dropped} if dropped else sizes)
    return table


def _readable(model: Any, edits: dict[str, Any]) -> bool:
    """Whether transformers accepts the config with these edits."""
    try:
        type(model.config).from_dict({**plain_config(model), **edits})
    except Exception:  # each architecture's config has its own way to refuse
        return False
    return True


def module_at(root: Any, path: str) -> Any:
    """What is at a path of attributes; None where there is nothing."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root
