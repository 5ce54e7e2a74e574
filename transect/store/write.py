"""Writing a file so that its name never stands for half of it, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|previous)-(?P<process>\d+)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`; after the `with` it takes that name. On an exception nothing has changed.

    What is written is on the disk before it gets its name, so that not even a loss of power leaves half of it.
    Raises OSError for a name that stands for anything but a file: a device or a pipe would be replaced by a file.
    """
    if os.path.lexists(path) and not stat.S_ISREG(mode := os.lstat(path).st_mode) and not stat.S_ISLNK(mode):
        raise FileExistsError(errno.EEXIST, "it is there, and is no file that could be replaced", str(path))
    sweep(path)
    partial = temporary(path)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def link(source: str | Path, destination: str | Path) -> None:
    """Give a file a second name, by a hard link, or where the file system has none, or it is another one, by a copy.

    A symbolic link is taken as such. `destination` never stands for half of a copy.
    """
    try:
        os.link(source, destination, follow_symlinks=False)
        return
    except OSError:  # EPERM, ENOTSUP, EXDEV, EMLINK ...: if nothing can be written there at all, the copy says so
        pass
    with replacing(Path(destination)) as partial:
        shutil.copyfile(source, partial, follow_symlinks=False)
        with suppress(OSError):  # such file systems may know no modes and times either
            shutil.copystat(source, partial, follow_symlinks=False)


def temporary(path: Path, kind: str = "partial") -> Path:
    """The name beside `path` under which this process prepares what is to stand there (`previous`: keeps what did)."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def sweep(path: Path) -> None:
    """Remove what processes that are no more had prepared for `path`, or kept of what stood there."""
    for left in leftovers(path):
        remove(left)


def leftovers(path: Path) -> list[Path]:
    """Temporary files and folders beside `path` that are nobody's any more."""
    try:
        beside = list(os.scandir(path.parent))
    except OSError:
        return []
    found = [(entry, _TEMPORARY.fullmatch(entry.name)) for entry in beside if entry.name.startswith(f".{path.name}.")]
    return [
        path.parent / entry.name
        for entry, match in found
        if match and match["name"] == path.name and not is_running(int(match["process"]))
    ]


def is_running(process: int) -> bool:
    """Whether another process of that number is there. What carries this process's own number it has itself left, or
    an earlier one of the same number (the first of a container)."""
    return process != os.getpid() and psutil.pid_exists(process)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that is allowed; a link, but not where it leads."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if not path.is_dir() or os.name != "nt":  # there a folder cannot be opened
        with suppress(PermissionError):  # a file that was copied with its mode, and may not be read
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def flush_all(folder: Path) -> None:
    """Wait until a folder is on the disk with all that is in it."""
    for inside, _, names in os.walk(folder):
        for name in names:
            file = Path(inside, name)
            if not file.is_symlink():
                flush(file)
        flush(Path(inside))
