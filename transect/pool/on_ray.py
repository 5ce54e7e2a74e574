"""Work on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ..arguments import shown
from ..errors import TransectError
from .losses import Losses
from .processes import Item, Load


def run_on_ray(
    load: Load,
    groups: Sequence[list[Item]],
    workers: int,
    on_item: Callable[[Item], None],
    finished: Callable[[Item], bool],
) -> dict[Item, str]:
    """Spread the groups over a Ray cluster (the running one, or a local one); see `run_in_processes`.

    What `load` reads must be visible to all nodes. An actor that is lost costs the item that it was at a second try.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError:
        raise TransectError("the engine ray needs an extra: pip install 'transect[ray]'") from None
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS") or None  # without one, a cluster of this machine, for this run alone
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except (ValueError, ConnectionError) as reason:
            raise TransectError(f"ray does not begin, with RAY_ADDRESS={shown(address)}: {reason}") from reason
    losses, waiting, running = Losses(), list(groups), {}
    try:
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0))
        actor: Any = ray.remote(num_cpus=max(1, int(total["CPU"]) // workers), num_gpus=gpus / workers if gpus else 0)(
            _RayWorker
        )

        def begin(idle: Any) -> None:
            if waiting:
                items = waiting.pop(0)
                idle = idle or actor.remote(load)
                running[idle.compute.remote(items)] = (idle, items)

        for _ in range(workers):
            begin(None)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            idle, items = running.pop(done)
            try:
                ray.get(done)
            except RayActorError as error:
                if error.actor_init_failed:
                    raise
                idle, left = None, [item for item in items if not finished(item)]
                items = [item for item in items if item not in left]
                if rest := losses.rest(left, "was lost"):
                    waiting.insert(0, rest)
            for item in items:
                on_item(item)
            begin(idle)
    finally:
        if started:
            ray.shutdown()
    return losses.why


class _RayWorker:
    def __init__(self, load: Load) -> None:
        self.worker = load()

    def compute(self, items: list[Item]) -> None:
        self.worker.run(items, lambda item: None)
