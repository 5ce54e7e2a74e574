"""Parameters that are one tensor at several places of a model, stored once.

What is shared are parameters, not modules: every place keeps modules of its own, with its own number in the cache, its
own hooks and its own activations. Copying, moving and casting a model keep its parameters shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import TransectError
from .record import record_of


def tie(model: nn.Module, paths: Sequence[str]) -> None:
    """Let the parameters at these paths be one tensor, that of the first, together with all that they are tied to now.

    TransectError, before any change, where there is no such parameter, or one of another shape.
    """
    found: dict[str, nn.Parameter] = {}
    for path in paths:
        try:
            found[path] = model.get_parameter(path)
        except AttributeError as error:
            raise TransectError(f"{path!r} cannot be tied: {error}") from None
    first = found[paths[0]]
    for path, parameter in found.items():
        if parameter.shape != first.shape:
            raise TransectError(
                f"{path} cannot be tied to {paths[0]}: its shape is {list(parameter.shape)}, not {list(first.shape)}"
            )
    record = record_of(model)
    joined = {record.tied[path] for path in paths if path in record.tied}
    members = [path for path, group in record.tied.items() if group in joined]
    name = paths[0]
    while name in record.tied.values() and name not in joined:
        name += "+"
    for path in dict.fromkeys([*paths, *members]):
        hold(model, path, first)
        record.tied[path] = name


def hold(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of that at a path."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, parameter)


def untie(model: nn.Module) -> None:
    """Give every place its own copy of what it shares by the record: from here on each can be changed by itself."""
    record = record_of(model)
    for paths in record.ties().values():
        for path in paths[1:]:
            shared = model.get_parameter(path)
            hold(model, path, nn.Parameter(shared.detach().clone(), shared.requires_grad))
    record.keep_ties({})


def refuse_shared(model: nn.Module, matrices: Iterable[Any]) -> None:
    """TransectError where one of the matrices is shared with another place, so that it cannot change alone."""
    tied = record_of(model).tied
    for matrix in matrices if tied else ():
        held = next((path for path in tied if path.startswith(f"{matrix.path}.")), None)
        if held is not None:
            others = [path for path, group in tied.items() if group == tied[held] and path != held]
            raise TransectError(
                f"{matrix.name} holds the same tensor as {', '.join(others[:3])}, so that it cannot be changed alone: "
                "change the model before its blocks are shared, or give each place its own first "
                "(transect.anatomy.Anatomy(model).untie()), and what was shared is stored as often as it is used"
            )
