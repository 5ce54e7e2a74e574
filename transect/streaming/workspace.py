"""What an unfinished streamed compression keeps on disk, and how far it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import TransectError
from ..statistics import Statistics
from ..store import Folder, Kept, keep, keep_json, kept, kept_json, remove

logger = logging.getLogger(__name__)
_STATE = "state.json"


class Workspace:
    """A folder of sums, activations and finished shards, which belongs to one run.

    How far each phase is stands in a state, with the names of the files that count, and the state is all that is gone
    by: a file is written first, then the state that names it, and only then go the files that no state names any more.
    So a kill at any moment leaves a state and all that it names.

    path: the folder. of: names all that decides the numbers of the run. kind: what it is, for a user.
    """

    def __init__(self, path: Path, of: str, kind: str = "an unfinished compression") -> None:
        self._folder, self._of = Folder(path, kind), of
        self._done: dict[str, int] = {}
        self._files: set[str] = set()
        self.note: Any = None

    def look(self) -> bool:
        """Read how far the run is, and change nothing; whether there is a state of it."""
        state = kept_json(self._folder.path / _STATE, self._of) if self._folder.is_ours else None
        if state is None:
            return False
        self._done, self._files, self.note = dict(state["done"]), set(state["files"]), state["note"]
        return True

    def begin(self) -> None:
        """Make the folder, or go on from what lies there.

        What is of another run is removed, and so is a run of which something is missing or damaged; a note says so.
        Raises TransectError for a folder that is not ours, and touches nothing in it.
        """
        with self._writing():
            self._folder.take()
            if self.look() and all(self._found(name) for name in self._files):
                return
            self._done, self._files, self.note = {}, set(), None
            if (self._folder.path / _STATE).exists():
                logger.info(
                    "what lies in %s of an unfinished run cannot be gone on from: it starts over", self._folder.path
                )
            remove(self._folder.path / _STATE)  # first, so that from here on nothing is done
            self._folder.empty()

    def tidy(self) -> None:
        """Remove the folder if a run that had come to its end has left nothing in it but the mark, or not even that."""
        path = self._folder.path
        if path.is_dir() and (self._folder.is_free or (self._folder.is_ours and self._folder.is_empty)):
            with self._writing():
                self._folder.take()
                self._folder.clear()

    def _found(self, name: str) -> bool:
        read = kept_json if name.endswith(".json") else kept
        return read(self._folder.path / name, self._of) is not None

    def wrote(self, path: Path) -> bool:
        """Whether a file of tensors, wherever it is now, is of this run and whole."""
        return kept(path, self._of) is not None

    def done(self, phase: str) -> int | None:
        """How many blocks the phase has behind it; None before it has begun."""
        return self._done.get(phase)

    def advance(self, phase: str, count: int, *, without: Sequence[tuple[str, int]] = (), note: Any = None) -> None:
        """From now on the phase has so many blocks behind it. without: kinds and numbers of files to remove.

        note: JSON to keep with the state from now on.
        """
        gone = {name for kind, index in without for name in (_tensors(kind, index), _json(kind, index))} & self._files
        self._done[phase] = count
        self._files -= gone
        self.note = self.note if note is None else note
        state = {"done": self._done, "files": sorted(self._files), "note": self.note}
        with self._writing():
            keep_json(self._folder.file(_STATE), state, self._of)
            for name in gone:
                (self._folder.path / name).unlink(missing_ok=True)

    def write(self, kind: str, index: int, tensors: Sequence[Tensor]) -> None:
        """Keep tensors, in order. What is written counts from the next `advance` on."""
        self.write_named(kind, index, {f"{i:06d}": tensor for i, tensor in enumerate(tensors)})

    def write_named(self, kind: str, index: int, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Keep tensors by name."""
        with self._writing():
            keep(self._folder.file(_tensors(kind, index)), tensors, self._of, note)
        self._files.add(_tensors(kind, index))

    def write_json(self, kind: str, index: int, value: Mapping[str, Any]) -> None:
        """Keep a JSON object."""
        with self._writing():
            keep_json(self._folder.file(_json(kind, index)), value, self._of)
        self._files.add(_json(kind, index))

    def write_statistics(self, kind: str, index: int, store: Statistics) -> None:
        """Keep the sums of a block."""
        self.write_named(kind, index, store.state(), str(store.dtype))

    def has(self, kind: str, index: int) -> bool:
        """Whether tensors of that kind and number are kept."""
        return _tensors(kind, index) in self._files

    def path(self, kind: str, index: int) -> Path:
        """Of the file of tensors of one kind and number."""
        return self._folder.path / _tensors(kind, index)

    def read(self, kind: str, index: int) -> list[Tensor]:
        """What `write` kept, in order.

        Copies: they lie in memory as what a run has computed, so that one that goes on rounds as one that never ended.
        """
        return [tensor.clone() for tensor in self.read_named(kind, index).values()]

    def read_named(self, kind: str, index: int) -> Kept:
        """What `write_named` kept."""
        found = kept(self.path(kind, index), self._of)
        if found is None:
            raise TransectError(f"{self.path(kind, index)} was changed while it was needed; run the same command again")
        return found

    def read_json(self, kind: str, index: int) -> dict[str, Any]:
        """What `write_json` kept."""
        path = self._folder.path / _json(kind, index)
        found = kept_json(path, self._of)
        if found is None:
            raise TransectError(f"{path} was changed while it was needed; run the same command again")
        return found

    def read_statistics(self, kind: str, index: int) -> Statistics:
        """What `write_statistics` kept."""
        found = self.read_named(kind, index)
        return Statistics.of_state(found, found.note)

    def remove(self) -> None:
        """The run is finished: all goes, the state last."""
        with self._writing():
            self._folder.empty(last=_STATE)
            self._folder.clear()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise TransectError(
                f"{self._folder.kind} cannot be kept in {self._folder.path}: {error}. When that is mended, the same "
                "command goes on from what is done"
            ) from error


def _tensors(kind: str, index: int) -> str:
    return f"{kind}-{index:05d}.safetensors"


def _json(kind: str, index: int) -> str:
    return f"{kind}-{index:05d}.json"
