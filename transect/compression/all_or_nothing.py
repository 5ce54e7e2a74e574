"""A change of a model that happens whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..anatomy import record_of

_STRUCTURE = ("_modules", "_parameters", "_buffers")


@contextmanager
def all_or_nothing(model: Any) -> Iterator[None]:
    """Where what runs inside fails, the model is as it was: its modules, attributes, tensors, configs and record.

    Nothing is copied but references, so the tensors that are exchanged inside stay in memory until the end, and what is
    written into one in place is not taken back: exchange `parameter.data` instead.
    """
    record = copy.deepcopy(record_of(model))
    modules = [(module, _state(module)) for module in model.modules()]
    tensors = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    configs = {id(one): one for module, _ in modules if (one := getattr(module, "config", None)) is not None}
    entries = [(config, dict(config.__dict__)) for config in configs.values()]
    try:
        yield
    except BaseException:
        for owner, state in [*modules, *entries]:
            owner.__dict__.clear()
            owner.__dict__.update(state)
        for tensor, data in tensors:
            tensor.data = data
        model.__dict__["_structure_record"] = record
        raise


def _state(module: Any) -> dict[str, Any]:
    """A module's attributes, with tables of its own of what stands in it."""
    return {name: dict(value) if name in _STRUCTURE else value for name, value in module.__dict__.items()}
