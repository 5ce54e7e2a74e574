"""The command line: parses, calls the Python API, prints.

One file a command in `commands`; what they share stands beside that folder. Errors and exit codes are handled here.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

import click
from rich.text import Text

from . import commands as commands
from .group import main_group
from .printing import stderr

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _complain(message: str) -> NoReturn:
    """One line on standard error, whatever the message is made of, and exit code 1."""
    stderr.print(Text.assemble(("error:", "bold red"), " ", " ".join(message.split())), soft_wrap=True)
    sys.exit(1)


def _note_interrupts() -> list[int]:
    """Let Ctrl-C also leave a note here: torch and safetensors may swallow the exception into one of their own."""
    noted: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
    return noted


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback. Exit code 1; 130 for Ctrl-C."""
    from ..errors import TransectError

    interrupts = _note_interrupts()
    try:
        main_group(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _stopped()
    except Exception as error:
        if interrupts:
            _stopped()
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, TransectError):
            _complain(str(error))
        if isinstance(error, OSError):  # a disk that is full, a folder that may not be written to
            _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        raise


def _stopped() -> NoReturn:
    """What Ctrl-C leaves behind: one word on standard error, and exit code 130."""
    stderr.print("stopped")
    sys.exit(130)
