"""The phases of the training, each a problem for the one loop: base, aspects, aggregator, and the router.

In all but the router's the mean of -log σ(r_better - r_worse) is lowered, and the state with the lowest mean on
held-out pairs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.batches import Batches
from ..data.split import share
from ..forward import Batch, at_rest
from ..training import Machine, Parameters, Problem
from .pairwise import pairwise_loss
from .scorer import Router, Scorer

Loss = Callable[[Any], tuple[Tensor, float]]


def base(scorer: Scorer, parts: tuple[Sequence[Batch], Sequence[Batch]], machine: Machine, name: str) -> Problem:
    """Phase 1: every number of the backbone, and the value head. parts: batches to train on, and held-out ones."""
    head = {f"head.{key}": p for key, p in scorer.head.named_parameters()}
    return _of_pairs(scorer, scorer.body_parameters() | head, parts, machine, name, scorer.base_rewards)


def aspect(
    scorer: Scorer, number: int, parts: tuple[Sequence[Batch], Sequence[Batch]], machine: Machine, name: str
) -> Problem:
    """Phase 2: one aspect's adapter and head; the backbone stays."""

    def rewards(batch: Batch) -> Tensor:
        return scorer.aspect_rewards(batch, number)

    return _of_pairs(scorer, scorer.aspect_parameters(number), parts, machine, name, rewards)


def aggregator(scorer: Scorer, parts: tuple[Sequence[Batch], Sequence[Batch]], machine: Machine, name: str) -> Problem:
    """Phase 3: the aggregator alone. What it reads does not change, and is computed once."""
    assert scorer.aggregator is not None
    ready = []
    for batches in parts:
        with torch.no_grad(), at_rest(scorer):
            ready.append([
                {"features": scorer.features(_rows(batch)).unflatten(0, (-1, 2)), "weight": batch["weight"]}
                for batch in batches
            ])  # fmt: skip
    parameters = {f"aggregator.{key}": p for key, p in scorer.aggregator.named_parameters()}

    def loss(batch: Batch) -> tuple[Tensor, float]:
        return _weighted(scorer.aggregated(batch["features"].flatten(0, 1)), batch["weight"])

    return _problem(scorer, parameters, (ready[0], ready[1]), machine, name, loss)


def router(model: Router, parts: tuple[Sequence[Batch], Sequence[Batch]], machine: Machine, name: str) -> Problem:
    """The classifier of prompts: every number, by cross-entropy."""

    def loss(batch: Batch) -> tuple[Tensor, float]:
        logits, labels = model({k: v for k, v in batch.items() if k != "labels"}), batch["labels"]
        return functional.cross_entropy(logits, labels.to(logits.device), reduction="sum"), len(labels)

    parameters = model.body_parameters() | {f"head.{key}": p for key, p in model.head.named_parameters()}
    return _problem(model, parameters, parts, machine, name, loss)


def _of_pairs(
    scorer: Scorer, parameters: Parameters, parts: tuple[Sequence[Batch], Sequence[Batch]], machine: Machine, name: str,
    rewards: Callable[[Batch], Tensor],
) -> Problem:  # fmt: skip
    def loss(batch: Batch) -> tuple[Tensor, float]:
        return _weighted(rewards(_rows(batch)), batch["weight"])

    return _problem(scorer, parameters, parts, machine, name, loss)


def _problem(
    module: nn.Module, parameters: Parameters, parts: tuple[Sequence[Batch], Sequence[Batch]], machine: Machine,
    name: str, loss: Loss,
) -> Problem:  # fmt: skip
    """parameters alone ask for gradients, so that backward goes no further than it must."""
    module.requires_grad_(False)
    training, held_out = (
        [*share(Batches([dict(one) for one in batches]), machine.index, machine.count)] for batches in parts
    )

    def set_mode() -> None:
        module.train()
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def measure() -> float:
        summed = torch.zeros(2, dtype=torch.float64)
        with at_rest(module):
            for batch in held_out:
                if batch is not None:
                    value, count = loss(batch)
                    summed += torch.tensor([value.item(), count], dtype=torch.float64)
        value, count = machine.total(summed).tolist()
        return value / count

    tokens = [int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0 for batch in parts[0]]
    return Problem(name, parameters, training, loss, measure, set_mode, tokens)


def _rows(batch: Batch) -> dict[str, Tensor]:
    """The 2 B sequences of B pairs, one after another."""
    return {name: tensor.flatten(0, 1) for name, tensor in batch.items() if name != "weight"}


def _weighted(rewards: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Loss of pairs, and their weights, summed; rewards (2 B): of each pair the better answer's first."""
    better, worse = rewards.unflatten(0, (-1, 2)).unbind(1)
    weight = weight.to(rewards.device)
    return (pairwise_loss(better, worse) * weight).sum(), weight.sum().item()
