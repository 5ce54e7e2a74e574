"""Work on many matrices at once: one to a core.

LAPACK's eigenvalues of one matrix gain little from a second thread; two matrices side by side take half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(
    function: Callable[[Item], Made],
    items: Sequence[Item],
    most: int | None = None,
    shown: Callable[[Sequence[Item]], Iterable[Item]] = iter,
) -> list[Made]:
    """[function(item) for item in items], as many at a time as torch has threads, each on a thread of its own.

    function: torch operations, which leave Python's lock alone while they compute. It must not start threads itself.
    most: run no more than so many at a time, where memory asks for it. shown: wraps the items to show progress; it
    advances as their results come. Raises the first error that a call raised.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items), most or threads)
    if workers < 2:
        return [function(item) for item in shown(items)]
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return [made for _, made in zip(shown(items), pool.map(function, items), strict=True)]
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what has not begun never does
        torch.set_num_threads(threads)
