"""One model, one search: sort, choose, cut, and see what was lost."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..anatomy import Anatomy
from ..compression.fingerprint import computation_fingerprint
from ..data import Batches
from ..data.split import share, split
from ..errors import Diverged, TransectError
from ..forward import at_rest
from ..statistics import Progress
from ..training import Machine, OnCheck, Run, Schedule, State, held_out_loss, on_device
from ..version import __version__
from .cut import cut, narrowed
from .order import sort_units
from .registry import searcher
from .settings import Settings
from .space import Space, default_sizes, space_of
from .super_network import SuperNetwork
from .task import Task


def search_anatomy(
    anatomy: Anatomy,
    settings: Settings,
    data: Batches,
    *,
    machine: Machine | None = None,
    state: State | None = None,
    progress: Progress | None = None,
    on_check: OnCheck = lambda check: None,
) -> tuple[Any, dict[str, Any]]:
    """A smaller model that the search has chosen, cut out of a copy of this one, and what came of it.

    data: see `Settings` for its three parts. state: where unfinished work is kept; the same call goes on from there.

    The outcome has `sizes` (of each axis), `weights` (of each choice at the end, where the method has any),
    `loss_before`, `loss_mixed` (of the mixture at these weights) and `loss_after` (of the result, before any further
    training) on the held-out sequences in nats, `numbers` (in the matrices of the model, and of the result), `kept`,
    `trained` (numbers: the model's and one for each choice of each axis), `steps`, `tokens`, `seconds`,
    `checks`, and what the method notes.
    Raises TransectError before any work if something cannot be done.
    """
    settings = settings.resolved()
    if anatomy.model.dtype == torch.float16:
        raise TransectError("small gradients vanish in float16: open the model in bfloat16 or float32 (dtype, --dtype)")
    anatomy.check_finite()
    rest, held_out = split(data, settings.held_out, settings.batch_size, settings.seed)
    training, validation = split(rest, settings.validation, settings.batch_size, settings.seed)
    sizes = settings.sizes or default_sizes(anatomy)
    space_of(anatomy, sizes, shared=settings.shared).check_reach(settings.keep)
    machine, state = machine or Machine(), state or State(None)
    plan = {
        "transect": __version__, "search": settings.to_dict(), "data": data.fingerprint,
        "model": computation_fingerprint(anatomy.model), "machine": machine.to_dict(),
    }  # fmt: skip
    state.begin(json.dumps(plan, sort_keys=True, default=str))
    machine.wait()
    copied = Anatomy(copy.deepcopy(anatomy.model), anatomy.architecture)
    with on_device(machine, [copied.model]), at_rest(copied.model, frozen=True):
        judging = share(held_out, machine.index, machine.count)
        before = held_out_loss(copied.model, judging, machine)
        sort_units(space_of(copied, sizes, shared=settings.shared), training, progress)
        space = space_of(copied, sizes, shared=settings.shared)  # sorting has put in new modules
        check_narrowing(space)
        copied.model.requires_grad_(False)

        def run(schedule: Schedule) -> Run:
            return Run(schedule, machine, state, progress, on_check)

        task = Task(
            space, settings, share(training, machine.index, machine.count),
            share(validation, machine.index, machine.count), machine, run, [Batches([b]).tokens for b in training],
        )  # fmt: skip
        found = searcher(settings.method).function(task, **settings.options)
        loss_mixed = found.network.loss_on(found.weights, judging, machine) if found.network else None
        whole, numbers = space.whole, space.size(found.picked)
        model = cut(space, found.picked)
        after = held_out_loss(model, judging, machine)
    if not math.isfinite(after):
        raise Diverged("the loss of the network that was found is not finite. Lower the rate")
    outcome = {
        "method": settings.method,
        "sizes": {name: axis.choices[found.picked[name]] for name, axis in space.axes.items()},
        "weights": {name: _by_size(space, name, found.weights) for name in space.axes if name in found.weights},
        "loss_before": before, "loss_mixed": loss_mixed, "loss_after": after, "numbers": [whole, numbers],
        "kept": numbers / whole, "trained": found.course.numbers, "steps": found.course.steps,
        "tokens": found.course.tokens, "seconds": round(found.course.seconds, 3), "checks": found.course.checks,
        **found.notes,
    }  # fmt: skip
    model.to(anatomy.model.device).train(anatomy.model.training).requires_grad_(True)
    return model, outcome


def _by_size(space: Space, name: str, weights: Mapping[str, Any]) -> dict[str, float]:
    return {str(size): float(w) for size, w in zip(space.axes[name].choices, weights[name], strict=True)}


@torch.no_grad()
def check_narrowing(space: Space) -> None:
    """Raise TransectError unless the super-network at its narrowest stream computes what the cut network does."""
    if "hidden" not in space.axes:
        return
    model = space.anatomy.model
    picked = {name: len(axis.choices) - 1 for name, axis in space.axes.items()} | {"hidden": 0}
    ids = torch.arange(2, device=model.device).repeat(1, 4)
    here = SuperNetwork(space).loss_on(space.one_hot(picked), [{"input_ids": ids}], Machine(model.device))
    there = narrowed(space, space.axes["hidden"].choices[0])
    alone = held_out_loss(there, [{"input_ids": ids}], Machine(model.device))
    if not math.isclose(here, alone, rel_tol=1e-2 if model.dtype == torch.bfloat16 else 1e-4):
        raise TransectError(
            f"a narrower {type(model).__name__} computes something else than a slice of this one (loss {alone:.5f} "
            f"against {here:.5f}): leave out hidden"
        )
