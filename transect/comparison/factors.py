"""Factorizations on disk: one file a method, read a rank at a time, so that no SVD is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..compression import Factorization
from ..store import Kept, keep, kept


class Factors(Mapping[str, Factorization]):
    """The factorizations of one method, read from its file when they are asked for. seconds: what they cost."""

    def __init__(self, stored: Kept) -> None:
        self._stored = stored
        self.seconds = float(stored.note["seconds"])
        self._names = sorted({key.split("|")[0] for key in stored})

    @staticmethod
    def save(path: Path, factors: Mapping[str, Factorization], seconds: float, of: str) -> None:
        """Write a file for `load`."""
        tensors = {}
        for name, made in factors.items():
            tensors |= {f"{name}|left": made.left, f"{name}|values": made.singular_values, f"{name}|right": made.right}
        keep(path, tensors, of, {"seconds": seconds})

    @staticmethod
    def load(path: Path, of: str) -> Factors | None:
        """What was saved of the same thing, or None."""
        stored = kept(path, of)
        return None if stored is None else Factors(stored)

    def __getitem__(self, name: str) -> Factorization:
        left, values, right = (self._stored[f"{name}|{part}"] for part in ("left", "values", "right"))
        return Factorization(left, values, right)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
