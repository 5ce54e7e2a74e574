"""Rates by layer are a function whose signature is its configuration: what a layer's weight makes of the learning rate.

`@rates_of_layers(name, ...)` registers `function(**settings) -> Factors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import TransectError
from ...parameters import Entry


@dataclass(frozen=True)
class Factors:
    """of: factors of the learning rate by layer, from the weights (d_out x d_in) of all layers as they are now.

    every: steps between two such looks, the first of which is before the first step; 0 for one at every epoch.
    """

    of: Callable[[Mapping[str, Tensor]], Mapping[str, float]]
    every: int = 0


@dataclass(frozen=True)
class LayerRates(Entry):
    """A registered way of choosing rates by layer."""

    family: ClassVar[str] = "rates"


_rates: dict[str, LayerRates] = {}


def rates_of_layers(name: str, *, paper: str) -> Callable[[Callable[..., Factors]], Callable[..., Factors]]:
    """Register rates by layer."""

    def register(function: Callable[..., Factors]) -> Callable[..., Factors]:
        _rates[name] = LayerRates(name, paper, function)
        return function

    return register


def layer_rates_named(name: str) -> LayerRates:
    """The rates by layer of that name, or an error that lists the known ones."""
    if name not in _rates:
        raise TransectError(f"unknown rates by layer {name!r}; known: {', '.join(sorted(_rates))}")
    return _rates[name]


def layer_rates() -> list[LayerRates]:
    """All registered rates by layer, by name."""
    return [_rates[name] for name in sorted(_rates)]
