"""The best numbers so far, on disk: while the training goes on they take no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..store import tensor_bytes


class Spill(Mapping[str, Tensor]):
    """A copy of tensors in a file without a name, which is gone with this process; each is read when asked for.

    folder: where the file lies; default the system's place for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._file = folder, tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - as long as this lives
        self._places: dict[str, tuple[int, Tensor]] = {}  # where it begins, and what it is like

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these, and none of those before; where that fails, on a full disk, those before."""
        file, places = tempfile.TemporaryFile(dir=self._folder), {}  # noqa: SIM115
        for name, tensor in tensors.items():
            places[name] = (file.tell(), torch.empty_like(tensor, device="meta"))
            file.write(tensor_bytes(tensor))
        file.flush()
        self._file.close()
        self._file, self._places = file, places

    def __getitem__(self, name: str) -> Tensor:
        begin, like = self._places[name]
        made = torch.empty(like.shape, dtype=like.dtype)
        if made.numel():
            self._file.seek(begin)
            self._file.readinto(tensor_bytes(made))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
