"""A claim is code: one sentence of a paper, and a function that measures it.

`@claim(name, method=..., paper=..., statement=...)` registers `function(context) -> Result`. Nothing in a claim is
chosen so that it comes out true: one that does not hold is reported as such, with its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..errors import NotApplicable as NotApplicable
from ..errors import TransectError
from ..parameters import listed

if TYPE_CHECKING:
    from .context import Context


class Verdict(StrEnum):
    """What the numbers say; FAILED where a fault of our own kept them from being measured."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_APPLICABLE = "not applicable"
    FAILED = "failed"

    @staticmethod
    def of(holds: object) -> Verdict:
        """HOLDS where that is true, not empty and not 0; else DOES_NOT_HOLD."""
        return Verdict.HOLDS if holds else Verdict.DOES_NOT_HOLD


@dataclass(frozen=True)
class Result:
    """verdict, the reason for it in a sentence or two, and the numbers behind it: a table, a dict a row."""

    verdict: Verdict
    explanation: str
    numbers: list[dict[str, Any]] = field(default_factory=list)


Check = Callable[["Context"], Result]


@dataclass(frozen=True)
class Claim:
    """One checkable sentence.

    name: `method/what`. method: whose claim it is. paper: where it is made. statement: the sentence.
    uses: the compression methods that it runs; their statistics are collected in one pass for all claims.
    """

    name: str
    method: str
    paper: str
    statement: str
    uses: tuple[str, ...]
    function: Check


_claims: dict[str, Claim] = {}


def claim(name: str, *, method: str, paper: str, statement: str, uses: Sequence[str] = ()) -> Callable[[Check], Check]:
    """Register a claim; see `Claim` for the fields."""

    def register(function: Check) -> Check:
        _claims[name] = Claim(name, method, paper, statement, tuple(uses), function)
        return function

    return register


def claims(names: Sequence[str] = ()) -> list[Claim]:
    """The claims of these names, each the name of a claim or of a method (all of its claims). Default: all claims."""
    chosen: dict[str, Claim] = {}
    for name in listed(names):
        found = {key: entry for key, entry in _claims.items() if name in (key, entry.method)}
        if not found:
            methods = dict.fromkeys(entry.method for entry in _claims.values())
            raise TransectError(
                f"there is no claim or method with claims named {name!r}; methods: {', '.join(methods)}; "
                f"claims: {', '.join(_claims)}"
            )
        chosen |= found
    return list((chosen if names else _claims).values())
