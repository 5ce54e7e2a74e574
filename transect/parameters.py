"""A registered function's signature is its configuration: what a user can choose of methods, probes and edits.

The keyword-only parameters with a default are the settings. They are checked against their annotations, listed by
`transect methods`, turned into options of the command line, and written down with the result.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .arguments import Range as Range
from .arguments import accepted, shown
from .arguments import listed as listed
from .errors import TransectError

Seed = Annotated[int, Range(0, 2**63 - 1)]  # of a generator of torch


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
        problem = TransectError(
            f"{owner}: {self.name}={shown(value)} must be {expected}{f' {self.range}' if self.range else ''}"
        )
        try:
            if isinstance(value, str) and self.kind is not str:
                value = {"true": True, "false": False}[value.lower()] if self.kind is bool else self.kind(value)
            elif self.kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
                value = str(value)  # one layer, where several are a text
            converted = accepted(self.kind, value, self.name)
        except (ValueError, KeyError):  # a TransectError is a ValueError
            raise problem from None
        if self.choices is not None and converted not in self.choices:
            raise problem
        if self.range is not None and converted not in self.range:
            raise problem
        return converted


def parameters_of(function: Callable[..., Any], documented: Any = None) -> list[Parameter]:
    """The keyword-only parameters of a function that have a plain value as default, with their `name: text` help.

    documented: what has the docstring with the help, if it is not the function, such as the class of a constructor.
    """
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
        told = _help(documented or function, parameter.name)
        found.append(Parameter(parameter.name, parameter.default, annotation, choices, interval, told))
    return found


def _help(function: Any, name: str) -> str:
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


def summary_of(function: Callable[..., Any]) -> str:
    """First line of the function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def settings_of(function: Callable[..., Any], owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings: the ones given, validated, and the defaults of the others. owner: what errors call it."""
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    unknown = set(given) - set(known)
    if unknown:
        raise TransectError(
            f"{owner} has no parameter {', '.join(sorted(unknown))}; it has: {', '.join(known) or 'none'}"
        )
    chosen = {name: parameter.default for name, parameter in known.items()}
    return chosen | {name: known[name].accept(value, owner) for name, value in given.items()}


def pieces(text: str) -> list[str]:
    """What stands between the commas of a setting such as "q, k"."""
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def block_numbers(text: str, blocks: Sized) -> list[int]:
    """Blocks written as "2", "1-3" (ends included) or "0,2-3", counted from 0, ascending; all for "all" and "".

    blocks: those of the model. Raises TransectError for anything else, and for blocks that do not exist.
    """
    count = len(blocks)
    if text.strip() in ("", "all"):
        return list(range(count))
    found: set[int] = set()
    for piece in map(str.strip, text.split(",")):
        first, dash, last = piece.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise TransectError(
                f'layers must be numbers and ranges with commas between, such as "0,2-3", or "all", got {shown(text)}'
            ) from None
        if not 0 <= low <= high < count:
            raise TransectError(f"layers {piece} do not exist: the model has blocks 0 to {count - 1}")
        found |= set(range(low, high + 1))
    return sorted(found)


@dataclass(frozen=True)
class Entry:
    """A registered function, with what a list of them and a command line have to know of it."""

    name: str
    paper: str
    function: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First sentence of the function's docstring."""
        return summary_of(self.function)

    @property
    def parameters(self) -> list[Parameter]:
        """The settings that a user can choose."""
        return parameters_of(self.function)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: the ones given, validated, and the defaults of the others."""
        return settings_of(self.function, self.name, given)
