"""Every change of a file as a place where a run can end: by an error, by Ctrl-C, or by a kill of which nobody hears.

Python announces each opening for writing, rename, removal, link and folder through its audit hooks, before it happens,
and takes an exception for an answer; what is written below Python (safetensors, the exchange of two names) announces
itself. So nothing of the package is replaced, and no operation is left out because a test did not think of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "transect.swap",
            "safetensors.write"}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_listener: list[Callable[[str, Path], None]] = []
_listening = False


def _hook(event: str, arguments: tuple) -> None:
    if not _listener or not (event == "open" or event in _CHANGES):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
        return
    where = arguments[0]
    if not isinstance(where, (str, bytes, os.PathLike)):
        return
    if event == "open" and arguments[2] & os.O_APPEND:
        event = "append"
    path = Path(os.fsdecode(where))
    number = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
    listener = _listener.pop()  # what it does itself is not listened to
    try:
        if number != -1:
            path = Path(os.readlink(f"/proc/self/fd/{number}")) / path
        listener(event, Path(os.path.abspath(path)))
    finally:
        _listener.append(listener)


@contextmanager
def listening(listener: Callable[[str, Path], None]) -> Iterator[None]:
    """Call the listener before every change of a file, with its kind and path."""
    global _listening
    if not _listening:
        sys.addaudithook(_hook)  # it stays to the end of the process
        _listening = True
    write = safetensors.torch.serialize_file

    def serialize_file(tensors, path, *args, **kwargs):
        sys.audit("safetensors.write", os.fspath(path))
        return write(tensors, path, *args, **kwargs)

    safetensors.torch.serialize_file = serialize_file
    _listener.append(listener)
    try:
        yield
    finally:
        _listener.clear()
        safetensors.torch.serialize_file = write


class Failing:
    """Inside the `with` the n-th change of a file below `root`, counted from 1, fails with `error`."""

    def __init__(self, root: Path, n: int, error: BaseException) -> None:
        self.root, self.left, self.error, self.fired = root, n, error, False

    def __enter__(self) -> Failing:
        self._listening = listening(self._on_change)
        self._listening.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.__exit__(None, None, None)

    def _on_change(self, event: str, path: Path) -> None:
        if self.root not in path.parents:
            return
        self.left -= 1
        if self.left == 0:
            self.fired = True
            raise self.error


class Kills:
    """Copies of `root` as a kill at each of its changes would leave it, each different state once.

    A file that was just opened for writing, or written by safetensors, is also there cut in half; one that was added
    to, with half of what was added. Hard links stay links.
    """

    def __init__(self, root: Path, into: Path) -> None:
        self.root, self.into = root, into
        self.states: list[Path] = []
        self._seen: set[str] = set()
        self._last: Path | None = None
        self._before = 0  # bytes of that file which were there before it was added to

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """What happens inside is recorded."""
        with listening(self._on_change):
            yield

    def _on_change(self, event: str, path: Path) -> None:
        if self.root not in path.parents and path != self.root:
            return
        state = self._copy()
        if self._last is not None and state is not None:
            torn = state / self._last.relative_to(self.root)
            if torn.is_file() and torn.stat().st_size > 1:
                self._torn(state, torn)
        self._last = path if event in ("open", "append", "safetensors.write") else None
        self._before = path.stat().st_size if event == "append" and path.exists() else 0

    def _copy(self) -> Path | None:
        """The tree as it is; None if it has been seen."""
        return self._kept(self.root)

    def _torn(self, state: Path, torn: Path) -> None:
        whole = torn.read_bytes()
        torn.write_bytes(whole[: (self._before + len(whole)) // 2])
        self._kept(state)
        torn.write_bytes(whole)

    def _kept(self, tree: Path) -> Path | None:
        mark = digest(tree)
        if mark in self._seen:
            return None
        self._seen.add(mark)
        state = self.into / f"{len(self.states):04d}"
        first: dict[int, str] = {}  # by its number, the name under which a file was copied

        def copy(source: str, target: str) -> None:
            number = os.stat(source).st_ino
            if number in first:
                os.link(first[number], target)
            else:
                first[number] = shutil.copy2(source, target)

        shutil.copytree(tree, state, symlinks=True, copy_function=copy)
        self.states.append(state)
        return state


def digest(tree: Path) -> str:
    """Of the names and contents of all that is in a folder."""
    found = hashlib.blake2b(digest_size=16)
    for inside, folders, names in os.walk(tree):
        folders.sort()
        found.update(os.path.relpath(inside, tree).encode() + b"/")
        for name in sorted(names):
            file = Path(inside, name)
            found.update(name.encode() + b"\0")
            found.update(os.readlink(file).encode() if file.is_symlink() else file.read_bytes())
    return found.hexdigest()
