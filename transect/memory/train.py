"""Training the memory: what nearest neighbours say, and what came next (Section 3.2 of arXiv:2508.01832)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy import Anatomy
from ..compression.fingerprint import computation_fingerprint
from ..data import Batches
from ..data.split import split
from ..statistics import Progress
from ..training import Machine, OnCheck, Problem, Run, Schedule, State, train
from ..version import __version__
from .datastore import Datastore, Targets, neighbours_of, states_of
from .mixture import Memory, attach, check, mixed_loss
from .settings import Settings

KIND = "an unfinished memory"  # what the folder of one is


def memory_loss(logits: Tensor, values: Tensor, targets: Targets, rows: Tensor, imitation: float) -> Tensor:
    """imitation KL(neighbours || memory) + (1 - imitation) cross-entropy, in nats, summed over the rows.

    logits: the memory's (n x V). values: the tokens that came next (n). rows: which of the targets these are (n).
    """
    log_q = logits.log_softmax(-1)
    said = (targets.weights[rows].to(log_q) * log_q.gather(1, targets.tokens[rows].to(log_q.device))).sum()
    divergence = -said - targets.entropy[rows].to(log_q).sum()
    return imitation * divergence + (1 - imitation) * functional.nll_loss(log_q, values, reduction="sum")


def memorize_anatomy(
    anatomy: Anatomy, settings: Settings, data: Batches, *, state: State | None = None,
    progress: Progress | None = None, on_check: OnCheck = lambda check: None,
) -> dict[str, Any]:  # fmt: skip
    """Give the model a memory of the data, in place; returns what came of it, which is also noted in its history.

    state: where neighbours and unfinished training are kept; the same call goes on from there. Who made it removes it.

    The model's own numbers stay. Returns `loss_before` and `loss_after` (of the model alone and of the mixture on the
    held-out sequences, in nats), `share` (of the memory in the mixture, where that loss is least), `temperature`,
    `positions` (in the datastore), `memory_parameters`, `seconds` and `checks`.
    """
    check(anatomy)
    model: Any = anatomy.model
    training, held_out = split(data, settings.held_out, 8, settings.seed)
    state = state or State(None)
    noted = {
        "transect": __version__, "memorize": asdict(settings), "data": data.fingerprint,
        "model": computation_fingerprint(model),
    }  # fmt: skip
    state.begin(json.dumps(noted, sort_keys=True))
    store, other = states_of(anatomy, training), states_of(anatomy, held_out)
    targets = _neighbours(store, settings, state)
    device, head = model.device, anatomy.unembedding
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        memory = Memory(store.keys.shape[1], settings.blocks).to(device)
        own = nn.Linear(store.keys.shape[1], head.weight.shape[0], bias=False).to(device)  # type: ignore[union-attr]
        nn.init.normal_(own.weight, std=0.02)
    both = nn.ModuleList([memory, own])

    def scores(found: Datastore) -> Tensor:
        with torch.no_grad():
            pieces = zip(found.keys.split(settings.batch), found.values.split(settings.batch), strict=True)
            logs = [own(memory(k.to(device))).log_softmax(-1).gather(1, v[:, None].to(device)) for k, v in pieces]
        return torch.cat(logs)[:, 0].cpu()

    def loss(rows: Tensor) -> tuple[Tensor, float]:
        logits = own(memory(store.keys[rows].to(device)))
        values = store.values[rows].to(device)
        return memory_loss(logits, values, targets, rows, settings.imitation), len(rows)

    order = torch.randperm(len(store.values), generator=torch.Generator().manual_seed(settings.seed))
    problem = Problem(
        "memory", dict(both.named_parameters()), order.split(settings.batch), loss,
        lambda: mixed_loss(other.own, scores(other), 1)[0], both.train,  # share 0 would not tell states apart
    )  # fmt: skip
    schedule = Schedule(lr=settings.lr, epochs=settings.epochs, shape="linear", seed=settings.seed)
    course = train(problem, Run(schedule, Machine(device), state, progress, on_check), {})
    after, share = mixed_loss(other.own, scores(other))
    attach(anatomy, memory, own.weight, share)
    outcome = {
        "loss_before": -float(other.own.double().mean()), "loss_after": after, "share": share,
        "temperature": targets.temperature, "positions": len(store.values),
        "memory_parameters": sum(p.numel() for p in both.parameters()), "seconds": course.seconds,
        "checks": course.checks,
    }  # fmt: skip
    anatomy.record.history.append({"transect": __version__, "memorize": asdict(settings), **outcome})
    return outcome


def _neighbours(store: Datastore, settings: Settings, state: State) -> Targets:
    """The targets, which take most of the time, from the state if they were found before."""
    found = state.read("neighbours")
    if found is not None:
        tensors, note = found
        return Targets(tensors["tokens"], tensors["weights"], tensors["entropy"], note["temperature"])
    targets = neighbours_of(store, settings.neighbours, settings.temperature)
    tensors = {"tokens": targets.tokens, "weights": targets.weights, "entropy": targets.entropy}
    state.write("neighbours", tensors, {"temperature": targets.temperature})
    return targets
