"""Settings that are several whole numbers."""

from __future__ import annotations

from ..errors import TransectError


def whole_numbers(owner: str, name: str, text: str, low: int = 0) -> list[int]:
    """ "1,2,4" as numbers, ascending, each once. low: the smallest that means something.

    TransectError for anything else, which names the study and its setting.
    """
    try:
        found = sorted({int(piece) for piece in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < low:
        raise TransectError(
            f'{owner}: {name} is whole numbers of {low} or more with commas in between, such as "1,2,4", got {text!r}'
        )
    return found
