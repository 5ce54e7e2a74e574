"""Work in several processes of this machine, which end with the one that has started them."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_all_start_methods, get_context, parent_process
from threading import Thread
from typing import Any

from ..errors import TransectError
from .losses import Losses

_READY = "ready"  # the model is loaded
Load = Callable[[], Any]  # makes a worker, which has `run(items, on_item)`; a partial of a function of a module
Item = Any  # hashable, and says what it is


def run_in_processes(
    load: Load,
    groups: Sequence[list[Item]],
    workers: int,
    on_item: Callable[[Item], None],
    finished: Callable[[Item], bool],
) -> dict[Item, str]:
    """Spread the groups over processes; the cores are shared out among them.

    load: called in each process. finished: whether the result of an item is on disk.
    A process that is lost (killed, as the system does where memory runs out) costs nothing but the item that it was
    at, which is tried once more in a new process. Returns why, for each item that was lost twice.
    Raises TransectError if no process can so much as load the model, and whatever an item raises.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    waiting, losses, pool, failed_starts = list(groups), Losses(), [], 0
    try:
        while waiting or pool:
            while waiting and len(pool) < workers:
                pool.append(_Process(load, threads, waiting.pop(0)))
            heard = connection.wait([one.pipe for one in pool])
            for one in [one for one in pool if one.pipe in heard]:
                message = one.receive()
                if isinstance(message, BaseException):
                    raise message
                if message == _READY:
                    failed_starts = 0
                elif isinstance(message, _Done):
                    one.items.remove(message.item)
                    on_item(message.item)
                elif message is None:  # the group is finished
                    one.give(waiting.pop(0) if waiting else [])
                else:
                    pool.remove(one)
                    ended = one.end(seconds=5)
                    for item in [item for item in one.items if finished(item)]:
                        one.items.remove(item)
                        on_item(item)
                    if one.ready or not one.items:
                        waiting[:0] = [rest] if (rest := losses.rest(one.items, ended)) else []
                        continue
                    waiting.insert(0, one.items)
                    workers, failed_starts = max(1, workers - 1), failed_starts + 1  # so many may not fit into memory
                    if not pool and failed_starts > 1:
                        raise TransectError(f"a process that was to work {ended} while it loaded the model")
    finally:
        for one in pool:
            one.end()
    return losses.why


class _Lost:
    """Received from a process that is no more."""


@dataclass(frozen=True)
class _Done:
    """Sent when an item is finished."""

    item: Item


class _Process:
    """One process, at work on `items`. ready: it has loaded the model."""

    def __init__(self, load: Load, threads: int, items: list[Item]) -> None:
        context = _context(load)
        self.pipe, theirs = context.Pipe()
        self.items: list[Item] = []
        self.ready = False
        self.process = context.Process(target=_serve, args=(theirs, load, threads), daemon=True)
        with _no_ctrl_c():
            self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.give(items)

    def give(self, items: list[Item]) -> None:
        """What to do; nothing to let it end."""
        self.items = list(items)
        with suppress(OSError):  # it is lost, which is what will be received
            self.pipe.send(items)

    def receive(self) -> Any:
        """What it says next: `_READY`, an item that is done, None for all of them, an error; `_Lost` at its end."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            return _Lost()
        self.ready = self.ready or message == _READY
        return message

    def end(self, seconds: float = 0) -> str:
        """End it unless it does so by itself within so many seconds; how it did."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _context(load: Load) -> Any:
    """How processes are started: forked from one that has imported everything, where the system can; it takes seconds.

    That one has run nothing, and so has no threads of torch's, which a fork of this process would miss.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([getattr(load, "func", load).__module__])
    return context


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """What is started inside is not interrupted by the terminal: the process that has started it ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Any, load: Load, threads: int) -> None:
    """What a process does: load the model, and compute the groups that it is given, until it is given none."""
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(threads)
        worker = load()
        pipe.send(_READY)
        while items := pipe.recv():
            worker.run(items, lambda item: pipe.send(_Done(item)))
            pipe.send(None)
    except Exception as error:
        pipe.send(_portable(error))


def _end_with_parent() -> None:
    """Without this a process goes on for hours, for nobody, after its parent was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> BaseException:
    """The error, with where it happened, as it can be sent to another process."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of its own kind, with its own arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
