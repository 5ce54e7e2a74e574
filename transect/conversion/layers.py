"""Which blocks a conversion is about, as a user writes it."""

from __future__ import annotations

from ..anatomy import Anatomy
from ..errors import TransectError


def layers_of(anatomy: Anatomy, written: str) -> list[int]:
    """Numbers of blocks of a text such as "0-5,7"; all of them where it is empty. TransectError for others."""
    count = len(anatomy.blocks)
    if not written.strip():
        return list(range(count))
    found: set[int] = set()
    for piece in written.split(","):
        first, dash, last = piece.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise TransectError(f"layers should be written like 0-5,7, not {written!r}") from None
        if not 0 <= low <= high < count:
            raise TransectError(f"layers {piece.strip()!r}: the model has blocks 0 to {count - 1}")
        found |= set(range(low, high + 1))
    return sorted(found)
