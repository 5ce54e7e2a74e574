"""From a JSON description back to a module, with uninitialised numbers. Nothing is ever pickled."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy.experts import SeparateExperts, SkipExperts
from ..anatomy.storage import Stacked
from ..anatomy.surgery import SkipAttention
from .base import Operator


def operator_kinds() -> dict[str, type[Operator]]:
    """Every structured operator by its kind: the subclasses of `Operator` that have been imported."""
    found, waiting = {}, [Operator]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            if "kind" in vars(subclass):  # not one that others derive from
                found[subclass.kind] = subclass
            waiting.append(subclass)
    return found


def build(description: dict[str, Any]) -> nn.Module:
    """The module that a structure record's entry describes; ValueError for a kind that does not exist."""
    kind = description.get("kind")
    if kind == "linear":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            return nn.Linear(description["in"], description["out"], bias=description["bias"])
    if kind == "conv1d":
        return Conv1D(description["out"], description["in"])
    if kind == "stacked":
        parts = {role: build(part) for role, part in description["parts"]}
        return Stacked(parts, description["head_size"])
    if kind == "skip_attention":
        return SkipAttention(
            description["layer_idx"], description["stand_in"], description.get("returns", 2), description.get("adds")
        )
    if kind == "experts":
        each = [{role: build(part) for role, part in expert.items()} for expert in description["each"]]
        return SeparateExperts(each, description["activation"])
    if kind == "skip_experts":
        return SkipExperts(description["experts"])
    kinds = operator_kinds()
    if kind not in kinds:
        raise ValueError(f"the structure record names an operator of unknown kind {kind!r}; known: {sorted(kinds)}")
    return kinds[kind].from_description(description)
