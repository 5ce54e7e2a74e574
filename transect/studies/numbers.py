"""Settings that are several numbers."""

from __future__ import annotations

import math
from typing import TypeVar

from ..errors import TransectError

Number = TypeVar("Number", int, float)
MOST = 2**31 - 1


def numbers(owner: str, name: str, text: str, kind: type[Number], low: float = 0) -> list[Number]:
    """ "1,2,4" as numbers of that kind, ascending, each once. low: the smallest that means something.

    TransectError for anything else, which names the study and its setting.
    """
    try:
        found = sorted({kind(piece) for piece in text.split(",")})
    except (ValueError, OverflowError):
        found = []
    if not found or not all(low <= one <= MOST and math.isfinite(one) for one in found):
        what = "whole numbers" if kind is int else "numbers"
        raise TransectError(
            f'{owner}: {name} is {what} of {low:g} or more with commas in between, such as "1,2,4", got {text[:100]!r}'
        )
    return found
