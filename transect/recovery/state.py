"""Unfinished work on disk: safetensors and JSON, each file written beside its place and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import TransectError
from ..store import replacing


class State:
    """A folder with `run.json` (which repair this is), `state.safetensors` (how far the training in progress is), and
    in the repair block by block `block-00000.safetensors` ... (what is finished).

    folder: None to keep nothing. writes: False in all processes but one.
    """

    def __init__(self, folder: Path | None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Keep what is there if it is of this very repair, and start over if it is of another one.

        Raises TransectError for a folder in which something else lies.
        """
        if self.folder is None or not self.writes:
            return
        file, text = self.folder / "run.json", json.dumps(plan, sort_keys=True)
        if self.folder.exists() and not file.is_file() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise TransectError(f"{self.folder} exists and is no unfinished repair: name another place for it")
        if not file.is_file() or file.read_text() != text:
            self.remove()
            self.folder.mkdir(parents=True)
            with replacing(file) as partial:
                partial.write_text(text)

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Write `name`.safetensors, with a note as JSON in its header."""
        if self.folder is None or not self.writes:
            return
        with replacing(self.folder / f"{name}.safetensors") as partial:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, partial,
                      metadata={"note": json.dumps(note)})  # fmt: skip

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `write` wrote, or None."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["note"])
        return load_file(path), note

    def remove(self) -> None:
        """The repair is finished, or is another one now."""
        if self.folder is not None and self.writes and self.folder.exists():
            shutil.rmtree(self.folder)
