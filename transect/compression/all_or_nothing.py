"""A change of a model that happens whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..anatomy import StructureRecord

_STRUCTURE = ("_modules", "_parameters", "_buffers")


@contextmanager
def all_or_nothing(model: Any) -> Iterator[None]:
    """Where what runs inside fails, the model is as it was: its modules, attributes, tensors, configs and records.

    Nothing is copied but references, so the tensors that are exchanged inside stay in memory until the end, and what is
    written into one in place is not taken back: exchange `parameter.data` instead.
    """
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
        raise


def _state(module: Any) -> dict[str, Any]:
    """A module's attributes, with copies of the tables of what stands in it and of its structure record."""
    state = dict(module.__dict__)
    state |= {name: dict(state[name]) for name in _STRUCTURE}
    return state | {key: copy.deepcopy(one) for key, one in state.items() if isinstance(one, StructureRecord)}
