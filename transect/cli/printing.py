"""What commands print with: results on standard output; errors, notes and bars on standard error."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Without markup: an error or a name may hold square brackets.
stderr = Console(stderr=True, markup=False, highlight=False)
stdout = Console(markup=False)


def print_whole(what: Any) -> None:
    """On standard output, never cut: what is wider than the terminal, or than 80 columns of a file, stays whole."""
    stdout.print(what, crop=False, no_wrap=isinstance(what, str), overflow="ignore", highlight=False)


class _Notes(logging.Handler):
    """What the package says of its work, each note once, on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        note = record.getMessage()
        if note not in self.said:
            self.said.add(note)
            stderr.print(note, soft_wrap=True)


def print_notes() -> None:
    """From now on print the notes of the package, and each of them again if it was printed before."""
    logger = logging.getLogger("transect")
    logger.setLevel(logging.INFO)
    logger.handlers = [one for one in logger.handlers if not isinstance(one, _Notes)] + [_Notes()]


def checks_printed(quiet: bool) -> Callable[[Any], None]:
    """What prints each check of a training (see `transect.training.Check`) on standard error, or nothing if quiet."""

    def say(check: Any) -> None:
        if not quiet:
            held_out = "" if math.isnan(check.held_out) else f"   held-out {check.held_out:.4f}"
            stderr.print(f"{check.name}: step {check.step}/{check.steps}   loss {check.loss:.4f}{held_out}")

    return say


@contextmanager
def progress_bar(quiet: bool) -> Any:
    """A function that shows a bar for an iterable, on standard error."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=stderr, transient=True, disable=quiet or not stderr.is_terminal,
    )  # fmt: skip

    def show(items: Iterable[Any], label: str) -> Iterable[Any]:
        items = list(items)
        task = bar.add_task(label, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
        bar.remove_task(task)

    with bar:
        yield bar, show
