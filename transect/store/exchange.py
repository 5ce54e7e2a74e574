"""Put a folder in its place whole: under its name is the old one or the new one, whatever happens meanwhile.

Where the system can exchange two folders in one step, that is done. Where it cannot, or the folder must stay the one
that it is (the current directory, a mount), its files are exchanged one by one, and a journal in it says which: until
the first is moved nothing has happened, and from then on whoever meets the journal finishes what it says.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import TransectError
from .text import read_json
from .write import flush, flush_all, is_running, remove, sweep, temporary, write_text

JOURNAL = ".transect-exchange.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def place_folder(new: Path, target: Path, replaced: Callable[[str], bool], last: str) -> None:
    """Give the finished folder `new` the name `target`, or its files to the folder that has this name.

    replaced: of the names in a folder that is there, which go; the others stay, but for those that `new` has too.
    last: the file without which nobody takes the folder for what it is; where files are exchanged one by one it is
        the first to go and the last to come.
    On any exception `target` is as it was. `new` is gone afterwards, or holds what was replaced.
    """
    flush_all(new)
    if not target.is_dir():
        os.rename(new, target)
        flush(target.parent)
        return
    names = {entry.name for entry in new.iterdir()}
    kept = [entry for entry in target.iterdir() if entry.name not in names and not replaced(entry.name)]
    if _may_be_another(target, kept):
        try:
            for entry in kept:
                _second_name(entry, new / entry.name)
            shutil.copystat(target, new)
            _swap(new, target)
            flush(target.parent)
            return
        except OSError:  # a file system without hard links, or without exchanges
            pass
    gone = [entry.name for entry in target.iterdir() if entry not in kept]
    _exchange_files(new, target, sorted(gone), sorted(names), last)


def finish_exchange(target: Path, last: str) -> None:
    """Finish what a process that is no more had begun in `target`.

    last: as for `place_folder`. Raises TransectError if that cannot be done here, or if the process is still at it.
    """
    sweep(target / JOURNAL)
    if not (target / JOURNAL).exists():
        if (target / last).exists():  # otherwise they may be all that there is
            sweep(target / target.name)
        return
    journal = read_json(target / JOURNAL)
    try:
        process = int(journal["process"])
        new, previous = _inside(target, journal["new"]), _inside(target, journal["previous"])
        gone, names = ([_plain(name) for name in journal[key]] for key in ("gone", "names"))
    except (KeyError, TypeError, ValueError) as error:
        raise TransectError(f"{target / JOURNAL} is damaged ({error!r}); remove it") from None
    if is_running(process):
        raise TransectError(f"{target} is being written by the process {process}; wait for it to end")
    try:
        _move(new, target, previous, gone, names, last)
        _close(new, target, previous)
    except OSError as error:
        raise TransectError(
            f"a save into {target} was broken off, and cannot be finished: {error}. The new files are in {new}, the "
            f"earlier ones in {previous}"
        ) from error


def _exchange_files(new: Path, target: Path, gone: list[str], names: list[str], last: str) -> None:
    """Move the files `gone` out of `target`, and those of `new` in; all, or nothing."""
    previous = target / temporary(target, "previous").name
    remove(previous)
    inside = target / temporary(target).name
    if new != inside:
        os.rename(new, inside)  # so that every path in the journal lies in the folder
        new = inside
    written = {"process": os.getpid(), "new": new.name, "previous": previous.name, "gone": gone, "names": names}
    write_text(target / JOURNAL, json.dumps(written))
    try:
        _move(new, target, previous, gone, names, last)
    except BaseException:
        for name in reversed(_order(names, last)):
            if not os.path.lexists(new / name):  # it has arrived
                os.rename(target / name, new / name)
        for name in reversed(_order(gone, last, first=True)):
            if os.path.lexists(previous / name):
                os.rename(previous / name, target / name)
        _close(new, target, previous)
        raise
    _close(new, target, previous)


def _move(new: Path, target: Path, previous: Path, gone: list[str], names: list[str], last: str) -> None:
    """From wherever it was left: what has been moved is not moved again."""
    previous.mkdir(exist_ok=True)
    for name in _order(gone, last, first=True):
        if not os.path.lexists(previous / name) and os.path.lexists(target / name):
            os.rename(target / name, previous / name)
    for name in _order(names, last):
        if os.path.lexists(new / name):
            os.rename(new / name, target / name)
    flush(target)


def _close(new: Path, target: Path, previous: Path) -> None:
    """Without the journal it is decided; what is left over is nobody's."""
    (target / JOURNAL).unlink(missing_ok=True)
    flush(target)
    remove(previous)
    remove(new)


def _order(names: list[str], last: str, first: bool = False) -> list[str]:
    return sorted(names, key=lambda name: (name == last) != first)


def _inside(target: Path, name: object) -> Path:
    return target / _plain(name)


def _plain(name: object) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file")
    return name


def _may_be_another(target: Path, kept: list[Path]) -> bool:
    """Whether another folder may take this one's place: nobody here stands in it, and nothing is mounted on it."""
    here = Path.cwd()
    if target.is_mount() or here == target or target in here.parents:
        return False
    return not any(Path(inside, name).is_mount() for entry in kept if entry.is_dir() and not entry.is_symlink()
                   for inside, names, _ in os.walk(entry) for name in ["", *names])  # fmt: skip


def _second_name(source: Path, destination: Path) -> None:
    """A file, or a folder with what is in it, under a second name; OSError where there are no hard links."""
    if source.is_dir() and not source.is_symlink():
        destination.mkdir()
        for entry in source.iterdir():
            _second_name(entry, destination / entry.name)
        shutil.copystat(source, destination)
    else:
        os.link(source, destination, follow_symlinks=False)


def _swap(first: Path, second: Path) -> None:
    """Exchange two names in one step. OSError where that cannot be done."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        raise OSError("this system cannot exchange two names")
    sys.audit("transect.swap", str(first), str(second))  # as Python itself announces a rename
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))
