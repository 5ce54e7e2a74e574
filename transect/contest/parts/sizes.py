"""Sizes with which models of different parts have the same number of parameters, or of operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import OutOfReach
from ...evaluation import parameters
from ...parts import Mixer, Part, build_model

Equal = Literal["parameters", "flops"]
WITHIN = 0.01


def fitted(
    base: str,
    parts: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int | None],
    equal: Equal,
    wanted: int,
    length: int,
) -> dict[str, int | None]:
    """The sizes with a number of neurons, and where that does not do a width, that make the count what is wanted.

    equal: which count: parameters, or floating point operations for a sequence of `length`. The neurons of the MLP are
    changed first; if the count is out of their reach, or nothing in the model depends on them, the stream's width, in
    steps of the heads and even for each. Raises OutOfReach if no width comes within 1 %.
    """

    def count(**changed: int) -> int:
        with torch.device("meta"):
            model = build_model(base, parts=parts, settings=settings, **{**sizes, **changed})
        return parameters(model) if equal == "parameters" else flops_of_model(model, length)

    hidden, heads = sizes.get("hidden") or 0, sizes.get("heads") or 1
    found: list[tuple[float, dict[str, int]]] = []
    if count(neurons=2) != count(neurons=4):
        neurons = _nearest(lambda size: count(neurons=size), wanted, 1, 64 * hidden)
        found.append((abs(count(neurons=neurons) / wanted - 1), {"neurons": neurons}))
    if not found or found[0][0] > WITHIN:
        step = 2 * heads
        steps = _nearest(lambda size: count(hidden=size * step), wanted, 1, 64 * hidden // step)
        found.append((abs(count(hidden=steps * step) / wanted - 1), {"hidden": steps * step}))
    off, changed = min(found, key=lambda one: one[0])
    if off > WITHIN:
        raise OutOfReach(
            f"no width gives {wanted:,} {equal} within 1 %: the nearest, {changed}, is {100 * off:.1f} % off; choose "
            "another number, or another --hidden"
        )
    return {**sizes, **changed}


def _nearest(count: Callable[[int], int], wanted: int, low: int, high: int) -> int:
    """The size whose count, which grows with it, is nearest to what is wanted."""
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle) <= wanted:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda size: abs(count(size) - wanted))


def flops_of_model(model: nn.Module, length: int) -> int:
    """Operations (a multiply-add counts 2) of one sequence of that length: every matrix at every position, and mixing.

    Of the model's own attention, the scores and sums of all positions by all.
    """
    total, inside = 0, set()
    for module in model.modules():
        if isinstance(module, Part):
            inside |= {id(one) for one in module.modules()}
            total += length * module.flops + (module.mixing_flops(length) if isinstance(module, Mixer) else 0)
    for module in model.modules():
        if id(module) not in inside and isinstance(module, (nn.Linear, Conv1D)):
            total += 2 * length * module.weight.numel()
    config: Any = model.config
    mixers = sum(isinstance(module, Mixer) for module in model.modules())
    plain = config.num_hidden_layers - mixers
    return total + plain * 4 * length * length * config.hidden_size
