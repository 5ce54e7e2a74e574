"""What commands print with: results on standard output; errors, notes and bars on standard error."""

from __future__ import annotations

from collections.abc import Iterable
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
