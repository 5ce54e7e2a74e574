"""Where a changed model is on disk as it is now: what an adapter that is trained on it must name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..anatomy.body import body_of
from ..anatomy.record import gathered_record, plain_path

_KEPT = "_structure_base"  # under which a body keeps the place, and its record at that time


def note_base(model: Any, where: str | Path) -> None:
    """Remember that the model, as it is now, is at that place: a folder or a hub name."""
    body = body_of(model)
    body.__dict__[_KEPT] = (str(where), gathered_record(body).to_dict())


def place_of_base(model: Any) -> str | None:
    """Where the model is as it is now, as far as is known."""
    body = body_of(model)
    where, record = body.__dict__.get(_KEPT, ("", None))
    return where if where and record == gathered_record(body).to_dict() else None


def without_adapters(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have without adapters and compiled blocks; the adapters' own left out."""
    kept = {"base_layer", "original_module"}  # what peft's layers hold beside their own numbers
    around = {path: kept & set(module._modules) for path, module in model.named_modules()}
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        outside = [".".join(parts[:i]) for i in range(len(parts)) if around.get(".".join(parts[:i]))]
        if all(name.removeprefix(path + ".").partition(".")[0] in around[path] for path in outside):
            found[plain_path(name)] = tensor
    return found
