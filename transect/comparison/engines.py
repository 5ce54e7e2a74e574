"""Where rows are computed: in this process, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from ..errors import TransectError
from .plan import Plan, Row
from .worker import Worker

Engine = Literal["local", "ray"]
OnRow = Callable[[Row], None]

_worker: Worker | None = None  # of a pool process: the model is loaded once and serves every group it is given


def run_here(worker: Worker, groups: Sequence[list[Row]], on_row: OnRow) -> None:
    """All rows in this process, one after another."""
    for rows in groups:
        worker.run(rows, on_row)


def run_in_processes(folder: Path, plan: Plan, groups: Sequence[list[Row]], workers: int, on_row: OnRow) -> None:
    """Spread the groups over processes; the cores are shared out among them."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(folder, plan, threads))
    with pool:
        futures = {pool.submit(_compute, rows): rows for rows in groups}
        try:
            for future in as_completed(futures):
                future.result()
                for row in futures[future]:
                    on_row(row)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_on_ray(folder: Path, plan: Plan, groups: Sequence[list[Row]], workers: int, on_row: OnRow) -> None:
    """Spread the groups over a Ray cluster (the running one, or a local one). `folder` must be visible to all nodes."""
    try:
        import ray
    except ImportError:
        raise TransectError("the engine ray needs an extra: pip install 'transect[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, configure_logging=False)
    try:
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0))
        actor: Any = ray.remote(num_cpus=max(1, int(total["CPU"]) // workers), num_gpus=gpus / workers if gpus else 0)(
            _RayWorker
        )
        pool = [actor.remote(str(folder.resolve()), plan) for _ in range(workers)]
        waiting, running = list(groups), {}
        for idle in pool:
            if waiting:
                rows = waiting.pop(0)
                running[idle.compute.remote(rows)] = (idle, rows)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            idle, rows = running.pop(done)
            ray.get(done)
            for row in rows:
                on_row(row)
            if waiting:
                rows = waiting.pop(0)
                running[idle.compute.remote(rows)] = (idle, rows)
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    def __init__(self, folder: str, plan: Plan) -> None:
        self.worker = load_worker(Path(folder), plan)

    def compute(self, rows: list[Row]) -> None:
        self.worker.run(rows, lambda row: None)


def load_worker(folder: Path, plan: Plan) -> Worker:
    """A worker in a fresh process: the model from its folder or hub name, the data from the run folder."""
    from ..checkpoint import open_model
    from ..data import Batches

    opened = open_model(plan.model, dtype=plan.dtype, device=plan.device, architecture=plan.architecture)
    data = {name: Batches.load(folder / f"{name}.safetensors") for name in ("calibration", "evaluation")}
    return Worker(folder, plan, opened.model, data["calibration"], data["evaluation"])


def _start(folder: Path, plan: Plan, threads: int) -> None:
    global _worker
    import torch

    torch.set_num_threads(threads)
    _worker = load_worker(folder, plan)


def _compute(rows: list[Row]) -> None:
    assert _worker is not None
    _worker.run(rows, lambda row: None)
