"""Give a plain skeleton the structure that a record describes; the weights come afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..anatomy.banks import link_banks
from ..anatomy.record import StructureRecord
from ..anatomy.surgery import assign
from ..errors import BadCheckpoint
from ..operators.build import build


def replay(model: Any, record: StructureRecord) -> StructureRecord:
    """Replace, resize and set in `model` what the record names; new numbers are uninitialised.

    The record describes a state, so replaying it twice does no more than replaying it once. It also fits a model
    with another head, or with none, than the one it was made on: paths gain or lose the base model's prefix.

    Returns the record with this model's own paths. Raises BadCheckpoint where the record does not fit the model.
    """
    record = StructureRecord(
        modules={_located(model, path): entry for path, entry in record.modules.items()},
        attributes={_located(model, path): entry for path, entry in record.attributes.items()},
        parameters={_located(model, path): entry for path, entry in record.parameters.items()},
        history=list(record.history),
    )
    for path, description in record.modules.items():
        model.set_submodule(path, _built(model, path, description))
    link_banks(model)
    for path, attributes in record.attributes.items():
        for attribute, value in attributes.items():
            assign(model.get_submodule(path), attribute, value)
    for path, shape in record.parameters.items():
        owner, _, name = path.rpartition(".")
        old = model.get_parameter(path)
        new = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        setattr(model.get_submodule(owner), name, new)
    return record


def _located(model: Any, path: str) -> str:
    """Where the model has what the record calls `path`."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        owner, _, name = candidate.rpartition(".")
        try:
            if hasattr(model.get_submodule(owner), name):
                return candidate
        except AttributeError:
            continue
    raise BadCheckpoint(f"the structure record names {path!r}, but {type(model).__name__} has nothing there")


def _built(model: Any, path: str, description: dict[str, Any]) -> nn.Module:
    old = model.get_submodule(path)
    like = next((p for p in old.parameters() if p.is_floating_point()), None)
    if like is None:  # an attention that was replayed before holds nothing but an empty stand-in
        like = next(p for p in model.parameters() if p.is_floating_point())
    try:
        with torch.device(like.device):
            new = build(description)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadCheckpoint(f"the structure record's entry for {path!r} cannot be built: {error!r}") from error
    return new.to(like.dtype).train(old.training)
