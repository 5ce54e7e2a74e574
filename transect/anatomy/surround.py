"""A module that is led by a part around it: what is in it, and where, stays as it is."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

AROUND = "around"  # the name under which a module holds what leads it


class Surrounded(nn.Module):
    """First among the bases of a module's new class: its call goes to its child `around`, with its own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part: Any = self._modules[AROUND]
        return part(self, super().forward, args, kwargs)

    @property
    def leading(self) -> Any:
        """The part around it."""
        return self._modules[AROUND].part  # type: ignore[union-attr]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (_plain(type(self)),), self.__dict__


def surround(module: nn.Module, part: nn.Module) -> None:
    """Let `part` lead the module, in place: it is called with the module, its own forward, and args and kwargs."""
    module.add_module(AROUND, part)
    if not isinstance(module, Surrounded):
        module.__class__ = _surrounded(type(module))


@functools.cache
def _surrounded(kind: type) -> type:
    """The class under the same name, since transformers and accelerate know the classes of blocks by it."""
    return type(kind.__name__, (Surrounded, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _plain(kind: type) -> type:
    return kind.__mro__[2]


def _bare(kind: type) -> Any:
    """An instance without anything in it, which copying and pickling fill."""
    made: Any = _surrounded(kind)
    return made.__new__(made)
