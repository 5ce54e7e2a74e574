"""Where rows are computed: in this process, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import TransectError
from .knowledge import Knowledge
from .losses import Losses
from .plan import Plan, Row
from .processes import run_in_processes
from .worker import Worker, load_worker

Engine = Literal["local", "ray"]
OnRow = Callable[[Row], None]

__all__ = ["Engine", "run_here", "run_in_processes", "run_on_ray"]


def run_here(worker: Worker, groups: Sequence[list[Row]], on_row: OnRow) -> None:
    """All rows in this process, one after another."""
    for rows in groups:
        worker.run(rows, on_row)


def run_on_ray(
    folder: Path,
    plan: Plan,
    groups: Sequence[list[Row]],
    workers: int,
    on_row: OnRow,
    knowledge: Knowledge | None = None,
) -> dict[Row, str]:
    """Spread the groups over a Ray cluster (the running one, or a local one). `folder` must be visible to all nodes.

    An actor that is lost costs the row that it was computing a second try; returned is why, for each lost twice.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError:
        raise TransectError("the engine ray needs an extra: pip install 'transect[ray]'") from None
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")  # without one, a cluster of this machine, for this run alone
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    losses, waiting, running = Losses(), list(groups), {}
    try:
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0))
        actor: Any = ray.remote(num_cpus=max(1, int(total["CPU"]) // workers), num_gpus=gpus / workers if gpus else 0)(
            _RayWorker
        )

        def begin(idle: Any) -> None:
            if waiting:
                rows = waiting.pop(0)
                idle = idle or actor.remote(str(folder.resolve()), plan, knowledge)
                running[idle.compute.remote(rows)] = (idle, rows)

        for _ in range(workers):
            begin(None)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            idle, rows = running.pop(done)
            try:
                ray.get(done)
            except RayActorError as error:
                if error.actor_init_failed:
                    raise
                idle, left = None, [row for row in rows if plan.finished(folder, row) is None]
                rows = [row for row in rows if row not in left]
                if rest := losses.rest(left, "was lost"):
                    waiting.insert(0, rest)
            for row in rows:
                on_row(row)
            begin(idle)
    finally:
        if started:
            ray.shutdown()
    return losses.why


class _RayWorker:
    def __init__(self, folder: str, plan: Plan, knowledge: Knowledge | None) -> None:
        self.worker = load_worker(Path(folder), plan, knowledge)

    def compute(self, rows: list[Row]) -> None:
        self.worker.run(rows, lambda row: None)
