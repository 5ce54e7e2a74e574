"""One run at a time in one place: a lock that is gone with its process, however that ends."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import distributed

from ..errors import TransectError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

logger = logging.getLogger(__name__)
_mine = threading.local()  # .places: where this thread writes, so that what it calls may ask for the same


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Inside the `with` no other run writes to `path`, a folder or a file, which need not exist.

    Runs that ask for the same are kept apart by a lock of the system (flock) on a file `.NAME.transect-lock` beside
    `path`, which holds the number of the process; where nothing can be written there, on the folder itself. What is
    called inside may ask for `path`, or for what lies in it, again. Processes of one run of torch.distributed are one
    run. A process that is killed leaves the file without its lock; the next one removes it.
    Where the system or the file system has no such locks, runs are not kept apart, and a note says so.

    wait: for the other run to end, with a note, instead of an error.
    Raises TransectError if another run, or another thread of this one, is writing there.
    """
    place = Path(path).expanduser().resolve()
    places: set[Path] = vars(_mine).setdefault("places", set())
    if places & {place, *place.parents} or (distributed.is_initialized() and distributed.get_rank() > 0):
        yield
        return
    if fcntl is None:
        logger.info("%s cannot be locked on this system: two runs that write there at once are not kept apart", place)
    with _locked(place, wait):
        places.add(place)
        try:
            yield
        finally:
            places.discard(place)


@contextmanager
def _locked(place: Path, wait: bool) -> Iterator[None]:
    made: list[Path] = []
    file = place.parent / f".{place.name}.transect-lock"
    descriptor = None if fcntl is None else _taken(place, file, made, wait)
    try:
        yield
    finally:
        try:
            if descriptor is not None and _is(file, descriptor):
                with suppress(OSError):
                    file.unlink()
            for folder in made:  # for the lock alone, unless something has come into it
                with suppress(OSError):
                    folder.rmdir()
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _taken(place: Path, file: Path, made: list[Path], wait: bool) -> int | None:
    """The descriptor that holds the lock; None where there is none to be had. made: gets the folders that are new."""
    for _ in range(100):
        try:
            _make(file.parent, made)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # another run has just removed the folder that it had made
            continue
        except OSError:  # whoever writes to `place` will say what is wrong, if anything is
            return _folder_taken(place, wait)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                return None
            _lock(descriptor, place, wait)
            if _is(file, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it meanwhile
    return None


def _folder_taken(folder: Path, wait: bool) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return None
    try:
        _lock(descriptor, folder, wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, place: Path, wait: bool) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        number = ""
        with suppress(OSError):  # a folder holds no number
            number = os.pread(descriptor, 20, 0).decode(errors="replace")
        said = f"another run{f' (process {number})' if number.isdigit() else ''} is writing to {place}"
        if not wait:
            raise TransectError(f"{said}; wait for it, or choose another folder") from None
        logger.info("%s; this one waits for it to end", said)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        logger.info("%s cannot be locked (%s): two runs that write there at once are not kept apart", place, error)


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it; `made` gets those that were not there, the innermost first."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    made[:0] = [one for one in new if one not in made]


def _is(file: Path, descriptor: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.lstat(file), os.fstat(descriptor))
    except OSError:
        return False
