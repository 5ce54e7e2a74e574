"""Folders of ours: what may be replaced and deleted in them is what we have written there, and nothing else.

A file `.transect` in such a folder says of which kind it is, and lists, a line each, the files that we wrote. A name is
in the list before the file is there, so that however a run ends, the next one knows what is its own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import TransectError
from ..version import __version__
from .write import flush, leftovers, sweep, write_text

logger = logging.getLogger(__name__)
MARK = ".transect"


class Folder:
    """A folder that carries our mark, or is about to.

    path: it need not exist. kind: what it is, in two or three words for a user ("a comparison").
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    @property
    def is_ours(self) -> bool:
        """Whether it carries the mark of this kind."""
        return self._marked() == self.kind

    @property
    def is_free(self) -> bool:
        """Whether nothing is there, or an empty folder, but for what a run that is no more has left."""
        if not os.path.lexists(self.path):
            return True
        mine = leftovers(self.path / MARK)
        return self.path.is_dir() and all(entry in mine for entry in self.path.iterdir())

    @property
    def is_empty(self) -> bool:
        """Whether none of the files that are ours is there."""
        return not any(os.path.lexists(self.path / name) for name in self.listed())

    def check_place(self, *, among_others: bool = False) -> None:
        """Raise TransectError if the folder is somebody else's. among_others: whether other files may lie in it."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise TransectError(f"{self.path} is a file; name a folder for {self.kind}")
        found = self._marked()
        if found not in (None, self.kind) or not (found or among_others or self.is_free):
            raise TransectError(
                f"the folder {self.path} exists and holds {found or f'something that is not {self.kind}'}; "
                "choose another"
            )

    def take(self, *, among_others: bool = False) -> None:
        """Make the folder and its mark, if they are not there; see `check_place`."""
        self.check_place(among_others=among_others)
        sweep(self.path / MARK)
        if not self.is_ours:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_mark()

    def check(self, *names: str) -> None:
        """Raise TransectError if a file of one of these names is there and is not ours."""
        ours = self._ours(names)
        for name in names:
            if os.path.lexists(self.path / name) and name not in ours:
                raise TransectError(
                    f"{self.path / name} is there and was not written by Transect as part of {self.kind}; move it "
                    "away, or name another folder"
                )

    def add(self, *names: str) -> None:
        """List files that are to be written: they are ours from now on; TransectError if one is there and is not."""
        self.check(*names)
        ours = self._ours(names)
        added = [name for name in dict.fromkeys(names) if name not in ours]
        for name in added:
            if not self._lies_inside(name):
                raise TransectError(f"{self.path / name} is reached through a link, and would not lie in {self.path}")
        if added:
            with (self.path / MARK).open("a", encoding="utf-8") as stream:
                stream.write("".join("\n" + json.dumps(name) for name in added))  # a line that a kill cut off ends here
                stream.flush()
                os.fsync(stream.fileno())

    def file(self, name: str) -> Path:
        """The path of a file to write, which is ours from now on; TransectError if that cannot be."""
        self.add(name)
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise TransectError(f"{path.parent} is not a folder, and {self.kind} has one there; move it away") from None
        if _is_folder(path) and any(path.iterdir()):
            raise TransectError(f"{path} is a folder with something in it, where {self.kind} has a file; move it away")
        if os.path.lexists(path) and not path.is_file():
            logger.info("%s is not used, since it is not a file: it is computed anew", path)
            _remove(path)  # a pipe, an empty folder or a link to nothing, under a name of ours
        sweep(path)
        return path

    def listed(self) -> set[str]:
        """Names, relative to the folder, of the files that are ours, whether they are there or not."""
        return {name for name in self._names() if self._lies_inside(name)}

    def _ours(self, names: Iterable[str]) -> set[str]:
        """Those of these names that are listed: only they are looked for in the folder."""
        listed = self._names()
        return {name for name in names if name in listed and self._lies_inside(name)}

    def _names(self) -> set[str]:
        """What stands in the mark, wherever it leads."""
        names = set()
        for line in self._lines()[1:]:
            with suppress(ValueError, RecursionError):
                if isinstance(name := json.loads(line), str):
                    names.add(name)
        return names

    def empty(self, last: str = "") -> None:
        """Delete what is ours but the mark, so that the folder can be filled anew. last: the file that goes last."""
        folders = set()
        for name in sorted(self.listed(), key=lambda name: (name == last, name)):
            path = self.path / name
            sweep(path)
            _remove(path)
            folders.update(path.parents[: len(Path(name).parents) - 1])
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            with suppress(OSError):  # something else lies in it
                folder.rmdir()
        if self._marked() is not None:
            self._write_mark()

    def clear(self) -> None:
        """Delete what is ours, the mark last; the folder too, if nothing else is in it."""
        self.empty()
        sweep(self.path / MARK)
        (self.path / MARK).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()
        if self.path.parent.is_dir():
            flush(self.path.parent)

    def _write_mark(self) -> None:
        """A mark that lists nothing."""
        write_text(self.path / MARK, json.dumps({"transect": __version__, "kind": self.kind}))

    def _marked(self) -> str | None:
        """The kind that stands in the mark; None without one."""
        lines = self._lines()
        if not lines:
            return None
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            return str(json.loads(lines[0])["kind"])
        return "something with a damaged mark of Transect's"

    def _lines(self) -> list[str]:
        path = self.path / MARK
        if not path.is_file():
            return []
        return path.read_text(encoding="utf-8", errors="replace").split("\n")

    def _lies_inside(self, name: str) -> bool:
        """Whether deleting the file of this name deletes something in the folder, and not what a link leads to."""
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or name == MARK or "\0" in name:
            return False
        return not any((self.path / Path(*parts[:i])).is_symlink() for i in range(1, len(parts)))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Delete a file. Of a folder that somebody made in its place, what is in it is theirs, and it stays."""
    if _is_folder(path):
        with suppress(OSError):
            path.rmdir()
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)
