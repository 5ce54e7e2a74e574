"""Unfinished training on disk, in a folder of ours; what is of another one, or damaged, is not gone on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..store import Folder, keep, kept


class State:
    """A folder with `state.safetensors` (how far the training in progress is), and what else is finished.

    folder: None to keep nothing. writes: False in all processes but one. kind: what the folder's mark says that it is.
    """

    def __init__(self, folder: Path | None, writes: bool = True, kind: str = "an unfinished training") -> None:
        self.folder, self.writes = None if folder is None else Folder(folder, kind), writes
        self._of = ""

    def check_place(self) -> None:
        """Raise TransectError for a folder in which something else lies."""
        if self.folder is not None and self.writes:
            self.folder.check_place()

    def begin(self, of: str) -> None:
        """What is there of this very training will be gone on from. of: names all that decides how it goes.

        Raises TransectError for a folder in which something else lies.
        """
        self._of = of
        if self.folder is not None and self.writes:
            self.folder.take()

    @property
    def keeps(self) -> bool:
        """Whether this process writes anything."""
        return self.folder is not None and self.writes

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Write `name`.safetensors, with a note as JSON in its header."""
        if self.folder is not None and self.keeps:
            keep(self.folder.file(f"{name}.safetensors"), tensors, self._of, note)

    @property
    def place(self) -> Path | None:
        """Where a training may put what it holds only while it runs; None for the system's place for such."""
        return None if self.folder is None or not self.folder.path.is_dir() else self.folder.path

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `write` wrote in this very training, or None."""
        found = None if self.folder is None else kept(self.folder.path / f"{name}.safetensors", self._of)
        return None if found is None else (dict(found), found.note)

    def remove(self) -> None:
        """The training is finished."""
        if self.folder is not None and self.writes:
            self.folder.clear()
