"""Comparisons of two models are probes whose specimen is a `Pair`."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import TransectError
from ..probes import Drawing, Probe, Result

_comparisons: dict[str, Probe] = {}


def comparing(
    name: str, *, title: str, draw: Callable[[Result], list[Drawing]], paper: str = "Transect's own"
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register `function(pair) -> Result`."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        _comparisons[name] = Probe(name, title, paper, function, draw=draw)
        return function

    return register


def comparison(name: str) -> Probe:
    """The comparison of that name, or an error that lists the known ones."""
    if name not in _comparisons:
        raise TransectError(f"unknown comparison {name!r}; known: {', '.join(comparisons())}")
    return _comparisons[name]


def comparisons() -> list[str]:
    """Names of all of them, in the order in which a reader wants them."""
    return [name for name in ("weights", "text", "knowledge", "loss") if name in _comparisons]
