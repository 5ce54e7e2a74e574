"""The command line: parses, calls the Python API, prints.

One file a command in `commands`; what they share stands beside that folder. Errors and exit codes are handled here.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import click
from rich.text import Text

from ..ending import LONGEST, line_of, shortened, stopping
from . import commands as commands
from .group import main_group
from .printing import stderr

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback, and exit code 1.

    Wrong usage is 2, and what ended by a signal 128 and its number: 130 for Ctrl-C, 143 for `kill`.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # closed, or not a stream of the system's
            reconfigure: Any = getattr(stream, "reconfigure")  # noqa: B009
            reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    with stopping() as signals:
        code = _run(signals)
        code = code if _flushed() else code or 1
        if code:
            atexit.register(_say_no_more)
        sys.exit(code)


def _run(signals: list[int]) -> int:
    """Run what the command line says; the exit code."""
    from ..errors import TransectError

    try:
        code = main_group(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):
            return _complain("a file or the input ended too early")
        return _stopped(signals)
    except Exception as error:
        if signals:
            return _stopped(signals)
        if isinstance(error, click.ClickException):
            # The option's name comes before it.
            setattr(error, "message", shortened(error.message, LONGEST - 80))  # noqa: B010
            error.show()
            return error.exit_code
        line = str(error) if isinstance(error, TransectError) else line_of(error)
        if line is None:
            raise
        return _complain(line)


def _complain(message: str) -> int:
    """One line on standard error, whatever the message is made of; the exit code."""
    with suppress(OSError):  # nobody can be told
        stderr.print(Text.assemble(("error:", "bold red"), " ", shortened(message)), soft_wrap=True)
    return 1


def _stopped(signals: list[int]) -> int:
    """What Ctrl-C leaves behind: one word on standard error, and the exit code."""
    with suppress(OSError):
        stderr.print("stopped")
    return 128 + (signals[0] if signals else signal.SIGINT)


def _say_no_more() -> None:
    """When Python ends, libraries may try to open files or write once more where that has just failed."""
    sys.unraisablehook = lambda unraisable: None


def _flushed() -> bool:
    """Whether standard output took everything; what it refuses must not be tried again when Python ends."""
    out = sys.stdout
    if out is None:  # a process without one
        return True
    try:
        out.flush()
        return True
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return False
