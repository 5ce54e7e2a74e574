"""From a JSON description back to a module, with uninitialised numbers. Nothing is ever pickled."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy.experts import SeparateExperts, SkipExperts
from ..anatomy.storage import Stacked
from ..anatomy.surgery import SkipAttention
from .base import Described, Operator

# Numbers that no tensor bounds, though a cache, or what is returned, gets so many entries: the largest there may be.
_COUNTED = {"layer_idx": 2**16, "returns": 16}


def operator_kinds() -> dict[str, type[Operator]]:
    """Every structured operator by its kind: the subclasses of `Operator` that have been imported."""
    return {kind: one for kind, one in described_kinds().items() if issubclass(one, Operator)}


def described_kinds() -> dict[str, type[Described]]:
    """The same for everything that a record can describe, parts in slots among them."""
    found, waiting = {}, [Described]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            if "kind" in vars(subclass):  # not one that others derive from
                found[subclass.kind] = subclass
            waiting.append(subclass)
    return found


def build(description: dict[str, Any], inside: bool = False) -> nn.Module:
    """The module that a structure record's entry describes.

    inside: whether it is a part of another, which can only be a single map. Raises ValueError for a kind that does not
    exist, and for entries that are of another type, or larger, than any that was ever written.
    """
    if not isinstance(description, dict):
        raise ValueError("a module's description should be an object")
    kind = description.get("kind")
    if isinstance(kind, str) and "." in kind:
        _check_settings(description)
    else:
        _check_entries(description)
    if kind == "linear":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            return nn.Linear(description["in"], description["out"], bias=description["bias"])
    if kind == "conv1d":
        return Conv1D(description["out"], description["in"])
    if kind in ("stacked", "skip_attention", "experts", "skip_experts") and inside:
        raise ValueError(f"a {kind!r} cannot be a part of another module")
    if kind == "stacked":
        parts = {role: build(part, inside=True) for role, part in description["parts"]}
        return Stacked(parts, description["head_size"])
    if kind == "skip_attention":
        adds = description.get("adds")
        if adds is not None:
            adds = (_text(adds[0]), _size(adds[1], 64))
        stand_in = _path(description["stand_in"])
        return SkipAttention(description["layer_idx"], stand_in, description.get("returns", 2), adds)
    if kind == "experts":
        each = [{role: build(part, inside=True) for role, part in expert.items()} for expert in description["each"]]
        return SeparateExperts(each, _text(description["activation"]))
    if kind == "skip_experts":
        return SkipExperts(_path(description["experts"]))
    kinds = described_kinds()
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"the structure record names a module of unknown kind {kind!r}; known: {sorted(kinds)}")
    return kinds[kind].from_description(description)


def _check_entries(description: dict[str, Any]) -> None:
    """Sizes are whole numbers that a tensor can have, what is so or not is true or false."""
    for key, value in description.items():
        if key in ("bias", "owns_bank", "symmetric"):
            if not isinstance(value, bool):
                raise ValueError(f"{key!r} should be true or false, not {value!r}")
        elif key in ("kind", "group"):
            _text(value)
        elif key in _COUNTED:
            if value is not None:
                _size(value, _COUNTED[key])
        elif isinstance(value, (int, float)):
            _size(value, 2**40)


def _check_settings(description: dict[str, Any]) -> None:
    """What a part in a slot was made with: sizes, finite numbers, what is so or not, short texts, or nothing."""
    for value in description.values():
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, float):
            if not abs(value) < 2.0**40:
                raise ValueError(f"{value!r} is no setting that a part can have")
        elif isinstance(value, str):
            _text(value)
        else:
            _size(value, 2**40)


def _size(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no whole number from 0 to {most}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(f"a short text is expected, not a {type(value).__name__}")
    return value


def _path(value: Any) -> str:
    """A path of a few names within a module."""
    parts = _text(value).split(".")
    if len(parts) > 8 or not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise ValueError(f"{value!r} is no path within a module")
    return value
