"""Writing a file so that its name never stands for half of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`; after the `with` it takes that name. On an exception nothing has changed."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
