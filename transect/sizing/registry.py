"""A search method is a function whose signature is its configuration: it picks one network of a space.

`@searching(name, ...)` registers `function(task, **settings) -> Found` (see `task`). It may train the weights of the
space's model, in place; sorting the units before, and cutting and judging afterwards, is done for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import TransectError
from ..parameters import Entry


@dataclass(frozen=True)
class Searcher(Entry):
    """A registered search method."""

    family: ClassVar[str] = "search"


_searchers: dict[str, Searcher] = {}


def searching(name: str, *, paper: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a search method."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _searchers[name] = Searcher(name, paper, function)
        return function

    return register


def searcher(name: str) -> Searcher:
    """The search method of that name, or an error that lists the known ones."""
    if name not in _searchers:
        raise TransectError(f"unknown search method {name!r}; known: {', '.join(sorted(_searchers))}")
    return _searchers[name]


def searchers() -> list[Searcher]:
    """All registered search methods, by name."""
    return [_searchers[name] for name in sorted(_searchers)]
