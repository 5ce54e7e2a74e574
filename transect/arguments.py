"""What a function's annotations say that it takes, held to it once, where a user calls it.

`@checked` reads them: plain types, `X | None`, `Literal`, lists and dicts of these, and in `Annotated` a `Range` of a
number or a `Kind` of whatever has no type of its own. Numbers of numpy and torch become Python's; what does not fit is
one TransectError that says what came and what was expected, before any work.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from .errors import TransectError

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D")
_SHOWN = 100  # characters of what came


@dataclass(frozen=True)
class Range:
    """Annotation of a number's permitted interval, ends included: `Annotated[float, Range(0, 1)]`.

    above, below: without its lower, or its upper end.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if not (self.above or self.below) and self.high < math.inf:
            return f"from {_number(self.low)} to {_number(self.high)}"
        low = f"{'above' if self.above else 'at least'} {_number(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_number(self.high)}"
        return low if self.high == math.inf else f"{low} and {high}"


@dataclass(frozen=True)
class Kind:
    """Annotation of what a value must be beyond its type.

    expected: in words, for the message. accept: gives what the function is to get; TypeError or ValueError, perhaps
    with a reason, for what is not of the kind.
    """

    expected: str
    accept: Callable[[Any], Any]


class _Refused(Exception):
    """The value is not what the annotation says; the message is a reason, or empty."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function's arguments are what its annotations say, or a TransectError is raised."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function, include_extras=True)
    named = [one for one in signature.parameters.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        for parameter in named:
            name = parameter.name
            if name in given.arguments:
                given.arguments[name] = accepted(
                    hints.get(name, Any), given.arguments[name], f"{function.__name__}: {name}"
                )
        return function(*given.args, **given.kwargs)

    return call


def checked_fields(value: D, owner: str) -> D:
    """The same for a dataclass: a copy whose fields are what its annotations say. owner: what errors call it."""
    hints = typing.get_type_hints(type(value), include_extras=True)
    found = {
        field.name: accepted(hints[field.name], getattr(value, field.name), f"{owner}: {field.name}")
        for field in fields(typing.cast(Any, value))
    }
    return typing.cast(D, replace(typing.cast(Any, value), **found))


def accepted(annotation: Any, value: Any, name: str) -> Any:
    """The value as the annotation wants it, or a TransectError. name: what the message calls it."""
    try:
        return _converted(annotation, value)
    except _Refused as refused:
        reason = f": {refused}" if str(refused) else ""
        raise TransectError(f"{name} must be {expected(annotation)}, got {shown(value)}{reason}") from None


def listed(value: Any) -> list[Any]:
    """Several values as a list; one alone, a string or a number, as a list of one: a name is not cut into letters."""
    return [value] if isinstance(value, (str, int, float)) else list(value)


def shown(value: Any) -> str:
    """What came, in at most a line."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, (str, bytes, numbers.Number, type(None), list, tuple, dict, set, type)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except Exception:  # a number of ten thousand digits, or somebody's own __repr__
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def expected(annotation: Any) -> str:
    """What an annotation accepts, in words."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        base, *extras = inside
        words = [] if base is Any else [expected(base)]
        for extra in extras:
            if isinstance(extra, Range):
                words[-1:] = [f"{words[-1]} {extra}"]
            elif isinstance(extra, Kind):
                words.append(extra.expected)
        return ", ".join(words)
    if origin is Literal:
        return _either([repr(choice) for choice in inside])
    if origin in (typing.Union, types.UnionType):
        return _either([expected(one) for one in inside])
    if _is_sequence(origin):
        return f"a list, each {expected(inside[0])}"
    if origin is Mapping:
        return "a dict" if inside[1] is Any else f"a dict, each value {expected(inside[1])}"
    if origin is Callable:
        return "a function"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _converted(annotation: Any, value: Any) -> Any:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        base, *extras = inside
        value = _converted(base, value)
        for extra in extras:
            if isinstance(extra, Range) and value not in extra:
                raise _Refused
            if isinstance(extra, Kind):
                value = _kept(extra, value)
        return value
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in inside):
            raise _Refused
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(inside, value)
    if _is_sequence(origin):
        if isinstance(value, (bytes, bytearray, Mapping)) or not (
            isinstance(value, (str, int, float)) or hasattr(type(value), "__iter__")
        ):
            raise _Refused
        return [_converted(inside[0], item) for item in listed(value)]
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _Refused
        return {_converted(inside[0], key): _converted(inside[1], item) for key, item in value.items()}
    if origin is Callable:
        if not callable(value):
            raise _Refused
        return value
    return _plain(annotation, value) if isinstance(annotation, type) else value


def _one_of(members: Sequence[Any], value: Any) -> Any:
    reasons = []
    for member in members:
        try:
            return _converted(member, value)
        except _Refused as refused:
            reasons.append(str(refused))
    raise _Refused("; ".join(filter(None, reasons)))


def _kept(kind: Kind, value: Any) -> Any:
    try:
        return kind.accept(value)
    except (TypeError, ValueError) as reason:
        raise _Refused(str(reason)) from None


def _plain(annotation: type, value: Any) -> Any:
    """A value of a class; numbers in whichever type of number they come."""
    if annotation in (int, float, bool):
        value = _scalar(value)
        if isinstance(value, bool) or annotation is bool:
            if annotation is bool and isinstance(value, bool):
                return value
            raise _Refused
        if not isinstance(value, numbers.Real):
            raise _Refused
        try:
            converted: Any = annotation(typing.cast(Any, value))
        except (OverflowError, ValueError):  # infinity or NaN as a whole number; an integer beyond every float
            raise _Refused from None
        if converted != value if annotation is int else not math.isfinite(converted):
            raise _Refused
        return converted
    if not isinstance(value, annotation):
        raise _Refused
    return value


def _scalar(value: Any) -> Any:
    """A number of numpy or torch as one of Python's."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, ValueError, TypeError):  # a tensor without values
            raise _Refused from None
    return value


def _is_sequence(origin: Any) -> bool:
    return origin in (Sequence, Iterable, list)


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _path(value: Any) -> Path:
    """Raises TypeError, or ValueError with the reason, for what cannot name a file."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("it is empty" if isinstance(text, str) else "")
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not known here
        raise ValueError(str(error)) from None
    above = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{above} is no folder")
    return path


def _folder(value: Any) -> Path:
    path = _path(value)
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"it is {'a file' if path.is_file() else 'there'}, and no folder")
    return path


def _file(value: Any) -> Path:
    path = _path(value)
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"it is {'a folder' if path.is_dir() else 'there'}, and no file")
    return path


# What is to be written. A device or a pipe is none of the two.
FolderName = Annotated[Any, Kind("the name of a folder (new or not)", _folder)]
FileName = Annotated[Any, Kind("the name of a file (new or not)", _file)]
