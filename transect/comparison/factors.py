"""Factorizations on disk: one file a method, read a rank at a time, so that no SVD is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..compression import Factorization
from ..store import replacing


def save_factors(path: Path, factors: Mapping[str, Factorization], seconds: float) -> None:
    """seconds: what the factorization cost."""
    tensors = {}
    for name, made in factors.items():
        tensors |= {f"{name}|left": made.left, f"{name}|values": made.singular_values, f"{name}|right": made.right}
    with replacing(path) as partial:
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata={"seconds": str(seconds)})


class Factors(Mapping[str, Factorization]):
    """The factorizations of one method, read from its file when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self.seconds = float((self._file.metadata() or {})["seconds"])
        self._names: Sequence[str] = sorted({key.split("|")[0] for key in self._file.keys()})  # noqa: SIM118

    def __getitem__(self, name: str) -> Factorization:
        left, values, right = (self._file.get_tensor(f"{name}|{part}") for part in ("left", "values", "right"))
        return Factorization(left, values, right)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
