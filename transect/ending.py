"""How the command line ends where it cannot go on: one word for a signal, one line for what a user can mend.

The package imports this before everything else, which takes seconds: a signal that comes meanwhile ends the process at
once, and a machine that has no room for the libraries is no traceback either.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn

LONGEST = 480  # characters of a message; with "error: " before it, a line has fewer than 500
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

_MEMORY = re.compile(
    r"can'?t allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc|unable to allocate|"
    r"failed to map segment|can't start new thread",
    re.IGNORECASE,
)
_DISK = re.compile(
    r"no space left on device|disk quota exceeded|file too large|\(os error (?:27|28|122)\)", re.IGNORECASE
)


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end; what was begun is cleaned up on the way."""


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Inside, a signal raises `Stopped`, once: another one that comes while that is being cleaned up changes nothing.

    Gives the numbers of the signals that came, since torch and safetensors may swallow the exception into one of their
    own. One that somebody has swallowed altogether is no longer being handled, so the next signal raises again.
    """
    noted: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        noted.append(number)
        if not any(isinstance(one, Stopped) for one in _history(sys.exception())):
            raise Stopped

    before = {number: signal.getsignal(number) for number in SIGNALS}
    _listen(on_signal)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            with suppress(TypeError, ValueError):  # a handler that is none of Python's; not in the main thread
                signal.signal(number, handler)


def shortened(message: str, longest: int = LONGEST) -> str:
    """A message as one line of at most `longest` characters that a terminal can show, the middle left out."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("ascii", "backslashreplace").decode() for c in line)
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    if len(line) <= longest:
        return line
    head = longest * 2 // 3
    return f"{line[:head]} ... {line[len(line) - (longest - head - 5) :]}"


def line_of(error: BaseException) -> str | None:
    """What to tell a user about an error that the machine, the place or the input made; None for a fault of ours."""
    for one in _history(error):
        if isinstance(one, MemoryError) or _number(one) == errno.ENOMEM or _MEMORY.search(_text(one)):
            return f"there is not enough memory{_detail(one)}; smaller batches, shorter sequences or --stream need less"
        if _number(one) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (
            type(one).__name__ == "SafetensorError" and _DISK.search(_text(one))
        ):
            return f"the disk is full, or a file may grow no further{_detail(one)}; make room, and run it again"
    if isinstance(error, RecursionError):
        return "something that was read is nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:200]!a} holds characters that cannot be written as {error.encoding}"
    if isinstance(error, UnicodeDecodeError):
        return f"something that was read is not {error.encoding} text: {error.reason} at byte {error.start}"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path or name holds a NUL character"
    if isinstance(error, OSError):
        return _of_the_system(error)
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file cannot be read or written: {error}"
    return None


def _of_the_system(error: OSError) -> str:
    if error.errno == errno.ENOENT and not _working_folder():
        return "the working folder is no longer there; change to one that is"
    said = f"{error.strerror or error}{_file(error)}"
    return f"{said}; allow more of them (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else said


def _working_folder() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _file(error: OSError) -> str:
    return "" if error.filename is None else f": {os.fsdecode(error.filename) if error.filename else repr('')}"


def _detail(error: BaseException) -> str:
    said = f"{error.strerror}{_file(error)}" if isinstance(error, OSError) and error.strerror else _text(error)
    return f" ({said})" if said else ""


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, Exception) else ""


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _history(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and what was being handled then."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _listen(handler: Callable[[int, Any], Any]) -> None:
    """Take the signals, except those that somebody ignores (nohup) or takes by themselves."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _at_once):
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)


def _at_once(number: int, frame: Any) -> NoReturn:
    """Nothing has been written yet, or all of it has."""
    with suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    line = line_of(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {shortened(line)}", file=sys.stderr)


def _is_the_command_line() -> bool:
    """Whether this process is `transect` or `python -m transect`, and no other program that uses the package."""
    words = list(sys.orig_argv[1:])
    while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
        del words[: 2 if words[0] in ("-X", "-W") else 1]
    if words[:1] == ["-m"]:
        return words[1:2] == ["transect"]
    return bool(words) and os.path.basename(words[0]).removesuffix(".exe") == "transect"


if _is_the_command_line():
    _listen(_at_once)
    sys.excepthook = _on_error
