"""Give a plain skeleton the structure that a record describes; the weights come afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..anatomy.banks import link_banks
from ..anatomy.record import StructureRecord
from ..anatomy.surgery import assign
from ..anatomy.surround import AROUND, surround
from ..anatomy.ties import hold
from ..errors import BadCheckpoint
from ..operators.build import build


def replay(model: Any, record: StructureRecord) -> StructureRecord:
    """Replace, resize and set in `model` what the record names; new numbers are uninitialised.

    The record describes a state, so replaying it twice does no more than replaying it once. It also fits a model
    with another head, or with none, than the one it was made on: paths gain or lose the base model's prefix.

    Returns the record with this model's own paths. Raises BadCheckpoint where the record does not fit the model.
    """
    for path, description in sorted(record.modules.items(), key=lambda entry: entry[0].count(".")):  # outer ones first
        around = path.endswith(f".{AROUND}")
        path = located(model, path.removesuffix(f".{AROUND}") if around else path)
        old = model.get_submodule(path)
        like = next((p for p in old.parameters() if p.is_floating_point()), None)
        if like is None:  # an attention that was replayed before holds nothing but an empty stand-in
            like = next(p for p in model.parameters() if p.is_floating_point())
        new = built(path, description, like.device).to(like.dtype).train(old.training)
        if around:
            surround(old, new)
        else:
            model.set_submodule(path, new)
    record = StructureRecord(
        modules={located(model, path): entry for path, entry in record.modules.items()},
        attributes={located(model, path): entry for path, entry in record.attributes.items()},
        parameters={located(model, path, "_parameters"): entry for path, entry in record.parameters.items()},
        tied={located(model, path, "_parameters"): group for path, group in record.tied.items()},
        history=list(record.history),
    )
    link_banks(model)
    for path, attributes in record.attributes.items():
        for attribute, value in attributes.items():
            try:
                assign(model.get_submodule(path), attribute, value)
            except ValueError as error:
                raise BadCheckpoint(f"the structure record's attributes of {path!r}: {error}") from None
    for path, shape in record.parameters.items():
        owner, _, name = path.rpartition(".")
        old = model.get_parameter(path)
        if len(shape) != old.ndim or any(size > present for size, present in zip(shape, old.shape, strict=True)):
            raise BadCheckpoint(f"the structure record gives {path!r} the shape {shape}, and it had {list(old.shape)}")
        new = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        setattr(model.get_submodule(owner), name, new)
    for paths in record.ties().values():
        _tie(model, paths)
    return record


def _tie(model: Any, paths: list[str]) -> None:
    """Let these parameters be one, now and, through transformers' table of such, when the weights have come."""
    source, *others = in_order(model, paths)
    for path in others:
        shape = model.get_parameter(path).shape
        if shape != model.get_parameter(source).shape:
            raise BadCheckpoint(
                f"the structure record ties {path!r} to {source!r}, and their shapes are {list(shape)} and "
                f"{list(model.get_parameter(source).shape)}"
            )
        hold(model, path, model.get_parameter(source))
        model.all_tied_weights_keys[path] = source


def in_order(model: Any, paths: list[str]) -> list[str]:
    """Paths of parameters in the model's own order: of those that are one tensor, the first names it in a file."""
    places = {path: place for place, (path, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(paths, key=lambda path: places.get(path, len(places)))


def built(path: str, description: Any, device: Any) -> nn.Module:
    """The module that the record has at `path`, with uninitialised numbers; BadCheckpoint if there can be none."""
    try:
        with torch.device(device):
            return build(description)
    except Exception as error:  # a description that somebody made up fails anywhere in the making
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadCheckpoint(f"the structure record's entry for {path!r} cannot be built: {reason}") from error


def located(model: Any, path: str, table: str = "_modules") -> str:
    """Where the model has what the record calls `path`, a module (or, in `_parameters`, a parameter)."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        *parents, name = candidate.split(".")
        owner: Any = model
        for parent in parents:
            owner = None if owner is None else owner._modules.get(parent)
        if owner is not None and getattr(owner, table).get(name) is not None:
            return candidate
    raise BadCheckpoint(f"the structure record names {path!r}, but {type(model).__name__} has nothing there")
