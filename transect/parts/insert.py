"""Putting parts into a model's slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..anatomy import Anatomy
from ..errors import TransectError
from ..forward.objective import task_of
from .part import Part, Sizes
from .registry import PartEntry, part_named
from .slots import MixerSlot


def insert(
    model: Any,
    slot: str,
    part: str,
    *,
    layers: Iterable[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Put a part into a slot of a model, in place and with random numbers; the model.

    slot: mixer, mlp, activation or norm. part: the name of a registered one, see `transect.parts`. layers: numbers of
    the blocks; default all, and for norms then the final one too. settings: the part's. seed: of its random numbers.
    Raises TransectError, before any change, if the part does not fit the model.
    """
    entry = part_named(slot, part)
    anatomy = Anatomy(model, weights=next(model.parameters()).device.type != "meta")  # of a skeleton only the sizes
    chosen = entry.settings(settings or {})
    count = len(anatomy.blocks)
    numbers = list(range(count)) if layers is None else list(layers)
    if not numbers or not all(0 <= number < count for number in numbers) or len(set(numbers)) != len(numbers):
        raise TransectError(f"layers should be distinct numbers from 0 to {count - 1}, not {numbers}")
    sizes = sizes_of(anatomy)
    made: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number in numbers:
            here = replace(sizes, layer=number)
            for path in places(anatomy, slot, number):
                made[path] = _standing(anatomy, entry, chosen, here)
        if slot == "norm" and layers is None and anatomy.final_norm is not None:
            path = f"{anatomy._prefix}{anatomy.architecture.final_norm}"
            made[path] = _standing(anatomy, entry, chosen, replace(sizes, layer=count - 1))
    for path, module in made.items():
        old = model.get_submodule(path)
        like = next((p for p in old.parameters() if p.is_floating_point()), next(model.parameters()))
        anatomy.model.set_submodule(path, module.to(like).train(old.training))
        anatomy.record.set_module(path, module.describe())
    return model


def _standing(anatomy: Anatomy, entry: PartEntry, settings: Mapping[str, Any], sizes: Sizes) -> Any:
    """The part, as it stands in its slot."""
    asked = {name: getattr(sizes, name) for name in entry.sizes}
    part: Part = entry.function(**asked, **settings)
    if entry.family == "mixer":
        return MixerSlot(part, sizes.layer, anatomy.architecture.attention_returns)  # type: ignore[arg-type]
    return part


def sizes_of(anatomy: Anatomy) -> Sizes:
    """The sizes that the model's config gives."""
    heads = anatomy.config_value("heads")
    config = anatomy.config
    eps = next((getattr(config, name) for name in _EPS if getattr(config, name, None)), 1e-6)
    width = anatomy.config_value("hidden")
    return Sizes(
        width=width,
        heads=heads,
        key_value_heads=anatomy.config_value("key_value_heads") or heads,
        head_size=anatomy.head_size,
        neurons=anatomy.config_value("neurons") or 4 * width,
        length=getattr(config, "max_position_embeddings", None) or 0,
        causal=task_of(anatomy.model) == "causal",
        layers=len(anatomy.blocks),
        eps=eps,
    )


_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


def places(anatomy: Anatomy, slot: str, number: int) -> list[str]:
    """Paths, from the model's root, of the modules that a slot of a block consists of; TransectError if it has none."""
    architecture, block = anatomy.architecture, anatomy.blocks[number]
    if slot == "mixer":
        if architecture.post_norm or architecture.attention_adds is not None:
            raise TransectError(
                f"the attention module of {architecture.name} adds the stream or norms it by itself, so that no mixer "
                "can stand for it: take a base whose blocks norm first, such as llama or gpt2 (or vit)"
            )
        return [str(block.slot_path("attention"))]
    if slot == "mlp":
        path = block.slot_path("mlp")
        if path is None or block.has_experts:
            raise TransectError(f"{architecture.name} has no MLP in one module: no part can be put in its place")
        return [path]
    if slot == "activation":
        if architecture.activation is None or block.has_experts:
            raise TransectError(f"the description of {architecture.name} names no activation that could be replaced")
        if block.part("mlp") is not None:
            raise TransectError(f"the MLP of block {number} is a part, which brings its own activation")
        return [f"{block.path}.{architecture.activation}"]
    return [
        name for name, module in block.model.named_modules() if any(module is norm for norm in block.norms.values())
    ]
