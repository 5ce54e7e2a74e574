"""A method is a function whose signature is its configuration.

`@factorization(name, paper=..., needs=[...])` declares one. The function's positional parameters are the weight and
the statistics that it needs, in the order of `needs`; its keyword-only parameters are the settings that a user can
choose. They are validated against their annotations, listed by `transect methods`, and written into the checkpoint.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import TransectError
from ..statistics import Statistic


@dataclass(frozen=True)
class Range:
    """Annotation of a number's permitted interval, ends included: `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float


@dataclass(frozen=True)
class Parameter:
    """One setting of a method: its name, default, what it accepts, and what it does."""

    name: str
    default: Any
    kind: type
    choices: tuple[Any, ...] | None
    range: Range | None
    help: str

    def accept(self, value: Any, owner: str) -> Any:
        """The value converted to the parameter's type (a command line passes strings), or an error."""
        expected = f"one of {list(self.choices)}" if self.choices else f"of type {self.kind.__name__}"
        if self.range:
            expected += f" from {self.range.low:g} to {self.range.high:g}"
        problem = TransectError(f"{owner}: {self.name}={value!r} must be {expected}")
        try:
            if self.kind is bool and isinstance(value, str):
                value = {"true": True, "false": False}[value.lower()]
            converted = self.kind(value)
        except (TypeError, ValueError, KeyError):
            raise problem from None
        if self.kind is not str and isinstance(value, (int, float)) and converted != value:
            raise problem
        if self.choices is not None and converted not in self.choices:
            raise problem
        if self.range is not None and not self.range.low <= converted <= self.range.high:
            raise problem
        return converted


@dataclass(frozen=True)
class Method:
    """A registered function with what a user and the frame have to know of it.

    needs: the statistics that it takes after the weight. refit: its paper offers the least-squares update.
    """

    name: str
    family: str
    paper: str
    function: Callable[..., Any]
    needs: tuple[Statistic, ...] = ()
    refit: bool = False

    @property
    def summary(self) -> str:
        """First sentence of the function's docstring."""
        return inspect.getdoc(self.function).partition("\n")[0]  # type: ignore[union-attr]

    @property
    def parameters(self) -> list[Parameter]:
        return parameters_of(self.function)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: the ones given, validated, and the defaults of the others."""
        known = {parameter.name: parameter for parameter in self.parameters}
        unknown = set(given) - set(known)
        if unknown:
            raise TransectError(
                f"{self.name} has no parameter {', '.join(sorted(unknown))}; it has: {', '.join(known) or 'none'}"
            )
        chosen = {name: parameter.default for name, parameter in known.items()}
        return chosen | {name: known[name].accept(value, self.name) for name, value in given.items()}


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """The keyword-only parameters of a function that have a plain value as default, with their `name: text` help."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            continue
        annotation, interval, choices = hints[parameter.name], None, None
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *extras = typing.get_args(annotation)
            interval = next((extra for extra in extras if isinstance(extra, Range)), None)
        if typing.get_origin(annotation) is Literal:
            choices = typing.get_args(annotation)
            annotation = type(choices[0])
        found.append(
            Parameter(parameter.name, parameter.default, annotation, choices, interval, _help(function, parameter.name))
        )
    return found


def _help(function: Callable[..., Any], name: str) -> str:
    """The text after `name:` in the docstring, up to the next line that is not indented deeper."""
    lines = (inspect.getdoc(function) or "").splitlines()
    for number, line in enumerate(lines):
        if line.startswith(f"{name}: "):
            text = [line.removeprefix(f"{name}: ")]
            for more in lines[number + 1 :]:
                if not more.startswith("    "):
                    break
                text.append(more.strip())
            return " ".join(text)
    return ""


_methods: dict[str, Method] = {}


def factorization(
    name: str, *, paper: str, needs: Sequence[Statistic] = (), refit: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `function(weight, *statistics, **settings) -> Factorization` as a low-rank method.

    weight: W (d_out x d_in), float64. The statistics come as their `value`s, float64, on the weight's device.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _methods[name] = Method(name, "factorization", paper, function, tuple(needs), refit)
        return function

    return register


def method(name: str) -> Method:
    """The method of that name, or an error that lists the known ones."""
    if name not in _methods:
        raise TransectError(f"unknown method {name!r}; known: {', '.join(sorted(_methods))}")
    return _methods[name]


def methods() -> list[Method]:
    """All registered methods, by name."""
    return [_methods[name] for name in sorted(_methods)]
