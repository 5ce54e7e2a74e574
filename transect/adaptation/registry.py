"""An adapter is a function whose signature is its configuration: it gives PEFT the config of a published method.

`@adapter(name, ...)` registers `function(paths, size, **settings) -> PeftConfig`. paths: of the linear layers that are
adapted. size: the one number that decides how many numbers are trained, under the name that the paper has for it (a
rank, a block); it is a parameter with a default like the others, and a contest sets it from a count that all share.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..anatomy.storage import shape_of
from ..errors import OutOfReach, TransectError
from ..parameters import Entry
from ..parameters import Range as Range
from ..training.parametrizations import Parametrization, parametrizations

Shape = tuple[int, int]
Counted = Callable[[int], int | None]


@dataclass(frozen=True)
class Adapter(Entry):
    """A registered way of choosing what is trained.

    size: the name of the parameter that decides how many numbers are trained. numbers: `numbers(d_out, d_in, size)`,
    how many those are in a matrix of that shape, or None if that size does not fit it. largest: `largest(d_out, d_in)`,
    above which a larger size changes nothing or is refused.
    rate: the largest learning rate, where the user names none.
    merges: whether its result can be written into the weights. rewrites: it changes the frozen weights at its start.
    only_linear: PEFT's tuner takes `nn.Linear` and no layer that stores its weight another way, such as GPT-2's.
    counting: `counting(model, paths, settings)` gives `count(size)`, how many numbers are trained in all these layers
    of the model: of an adapter for which shape and size do not decide that.
    """

    family: ClassVar[str] = "adapter"
    size: str
    numbers: Callable[[int, int, int], int | None]
    largest: Callable[[int, int], int] = min
    rate: float = 3e-4
    merges: bool = True
    rewrites: bool = False
    only_linear: bool = False
    counting: Callable[[Any, list[str], Mapping[str, Any]], Counted] | None = None

    def config(self, paths: list[str], settings: Mapping[str, Any]) -> Any:
        """The PEFT config for these layers; None if every number of the model is trained as it is."""
        return self.function(paths, **self.settings(settings))

    def check(self, targets: Mapping[str, Shape], settings: Mapping[str, Any]) -> None:
        """TransectError, naming the layer, where the size does not fit. targets: (d_out, d_in) by path."""
        size = self.settings(settings).get(self.size)
        for path, shape in targets.items():
            if size is not None and size > self.largest(*shape):
                raise TransectError(
                    f"{self.name}: {self.size}={size} is above {self.largest(*shape)}, the largest for {path} "
                    f"({shape[0]} x {shape[1]})"
                )
            if size is not None and self.numbers(*shape, size) is None:
                fit = [n for n in range(1, self.largest(*shape) + 1) if self.numbers(*shape, n) is not None]
                raise TransectError(
                    f"{self.name}: {self.size}={size} does not fit {path} ({shape[0]} x {shape[1]}); there "
                    f"{', '.join(map(str, fit))} would"
                )

    def check_kinds(self, layers: Mapping[str, nn.Module]) -> None:
        """TransectError for a linear layer, by path, of a kind that it does not adapt."""
        for path, layer in layers.items():
            if self.only_linear and not isinstance(layer, nn.Linear):
                kind, others = type(layer).__name__, ", ".join(one.name for one in adapters() if not one.only_linear)
                raise TransectError(
                    f"{self.name} adapts Linear layers alone, and {path} is a {kind}: choose one of {others}"
                )

    def trained(self, shapes: Iterable[Shape], size: int) -> int | None:
        """How many numbers are trained in matrices of these shapes; None if the size does not fit one of them."""
        counts = [self.numbers(*shape, size) for shape in shapes]
        return None if None in counts else sum(count for count in counts if count is not None)

    def size_for(self, shapes: list[Shape], most: int) -> int:
        """The largest size that fits and trains at most so many numbers; OutOfReach if there is none."""
        return self._largest(shapes, most, lambda size: self.trained(shapes, size))

    def trained_in(self, model: Any, paths: list[str], settings: Mapping[str, Any]) -> int | None:
        """How many numbers are trained in these layers of a model; None if the size does not fit one of them."""
        chosen = self.settings(settings)
        return self._counted(model, paths, chosen)(chosen.get(self.size, 0))

    def size_in(self, model: Any, paths: list[str], most: int, settings: Mapping[str, Any]) -> int:
        """The largest size with which at most so many numbers are trained in these layers; OutOfReach if none.

        settings: the others.
        """
        return self._largest(_shapes(model, paths), most, self._counted(model, paths, self.settings(settings)))

    def _counted(self, model: Any, paths: list[str], settings: Mapping[str, Any]) -> Counted:
        if self.counting is not None:
            return self.counting(model, paths, settings)
        shapes = _shapes(model, paths)
        return lambda size: self.trained(shapes, size)

    def _largest(self, shapes: list[Shape], most: int, count: Counted) -> int:
        sizes = range(1, max(self.largest(*shape) for shape in shapes) + 1)
        counts = {size: count(size) for size in sizes}
        fitting = [size for size, number in counts.items() if number is not None and number <= most]
        if not fitting:
            least = min((number for number in counts.values() if number is not None), default=None)
            reason = "no size fits these matrices" if least is None else f"it trains {least:,} numbers at the least"
            raise OutOfReach(f"{self.name} cannot train as few as {most:,} numbers: {reason}")
        return max(fitting)


def _shapes(model: Any, paths: list[str]) -> list[Shape]:
    return [shape_of(model.get_submodule(path)) for path in paths]


_adapters: dict[str, Adapter] = {}


def adapter(
    name: str, *, paper: str, size: str, numbers: Callable[[int, int, int], int | None], **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an adapter; see `Adapter` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _adapters[name] = Adapter(name, paper, function, size, numbers, **more)
        return function

    return register


def load() -> None:
    """Import the catalog, and PEFT with it."""
    try:
        importlib.import_module(".catalog", __package__)
    except ModuleNotFoundError as missing:
        if missing.name != "peft":
            raise
        raise TransectError("adapters need the package peft: pip install 'transect[recover]'") from None


def adapter_named(name: str) -> Adapter:
    """The adapter of that name, or an error that lists the known ones."""
    load()
    if name not in _adapters:
        raise TransectError(f"unknown adapter {name!r}; known: {', '.join(sorted(_adapters))}")
    return _adapters[name]


def way_named(name: str) -> Adapter | Parametrization:
    """The adapter or the parametrization of that name, or an error that lists the known ones."""
    for one in parametrizations():
        if one.name == name:
            return one
    load()
    if name not in _adapters:
        known = sorted({*_adapters, *(one.name for one in parametrizations())})
        raise TransectError(f"unknown method {name!r}; known: {', '.join(known)}")
    return _adapters[name]


def adapters() -> list[Adapter]:
    """All registered adapters, by name."""
    load()
    return [_adapters[name] for name in sorted(_adapters)]
