"""How many ranks each matrix gets, chosen apart from how it is factorized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import TransectError
from ..registry import Method
from .table import Ranks, RankTable

# Divergence of the whole model with these ranks from the dense model; matrices that are not named stay dense.
Measure = Callable[[Mapping[str, int | None]], float]
Allocate = Callable[..., Ranks]

_allocations: dict[str, Method] = {}
_measuring: set[str] = set()


def allocation(name: str, *, paper: str = "-", measures: bool = False) -> Callable[[Allocate], Allocate]:
    """Register `function(tables, keep, measure, **settings) -> Ranks`.

    measures: it runs the model while it searches; `measure` is None for the others.
    """

    def register(function: Allocate) -> Allocate:
        _allocations[name] = Method(name, "allocation", paper, function)
        if measures:
            _measuring.add(name)
        return function

    return register


def allocation_named(name: str) -> Method:
    """The allocation of that name, or an error that lists the known ones."""
    if name not in _allocations:
        raise TransectError(f"unknown allocation {name!r}; known: {', '.join(_allocations)}")
    return _allocations[name]


def allocations() -> list[Method]:
    """All registered allocations."""
    return list(_allocations.values())


def needs_measure(name: str) -> bool:
    """Whether the allocation runs the model while it searches."""
    return allocation_named(name).name in _measuring


def allocate(
    name: str, tables: Sequence[RankTable], keep: float, measure: Measure | None, settings: Mapping[str, Any]
) -> Ranks:
    """Ranks for all matrices whose bytes are at most `keep` of the dense ones."""
    if keep == 1:
        return {table.name: None for table in tables}
    chosen = allocation_named(name)
    return chosen.function(tables, keep, measure, **chosen.settings(settings))
