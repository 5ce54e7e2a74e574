"""What the study trains: plain networks that read digits, and small language models that read text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....contest.parts import built
from ....errors import TransectError
from ....forward import predictions
from ....merging import match_chain
from ....tasks import task_named
from ....tasks.digits import shuffled
from ....training import Machine, Problem, Run, Schedule, State, own_loss, train
from .losses import Loss
from .similarity import Outputs
from .zoo import Measures, Recipe

Rows = Mapping[str, Tensor]  # examples by name, the first dimension counts them
Temperature = Literal["batch-size", "learning-rate"]
HELD_OUT, PIECES, LENGTH = 360, 512, 32  # images; pieces of text to train on, and tokens in each
MEASURED = 128  # examples in a batch that is measured on
BLOCKS, HEADS = 2, 2  # of a language model


@dataclass(frozen=True)
class Material:
    """training, held_out: what `labels` asks for, beside what the model reads. build: (width, seed) -> a model.

    optimizer: name, options and rate of its own. curved: how many examples the Hessian is of. For the others see
    `Measures`.
    """

    training: Rows
    held_out: Rows
    build: Callable[[int, int], nn.Module]
    loss: Loss
    error: Loss
    outputs: Outputs
    optimizer: tuple[str, dict[str, float], float]
    curved: int
    match: Callable[[Any, Any], nn.Module] | None = None


def digits(noise: float, seed: int) -> Material:
    """Networks 64 -> width -> width -> 10 with ReLU on scikit-learn's digits: 1,437 images to train on, 360 held out.

    SGD with momentum 0.9 and weight decay 5e-4, as the zoo's residual networks. The rate is 0.03: at their 0.1 some of
    these networks, which have no norms, are dead after batches of 8. noise: see `relabelled`.
    """
    pixels, classes, order = shuffled()
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    training, held_out = ({"pixel_values": pixels[part].flatten(1), "labels": classes[part]} for part in (rest, held))
    training["labels"] = relabelled(training["labels"], 10, noise, seed)

    def build(width: int, seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
            return nn.Sequential(*layers)

    def outputs(model: Any, batch: Rows) -> Tensor:
        return model(batch["pixel_values"])

    def loss(model: Any, batch: Rows) -> tuple[Tensor, float]:
        return functional.cross_entropy(outputs(model, batch), batch["labels"], reduction="sum"), len(batch["labels"])

    def error(model: Any, batch: Rows) -> tuple[Tensor, float]:
        return (outputs(model, batch).argmax(-1) != batch["labels"]).sum(), len(batch["labels"])

    optimizer = "sgd", {"momentum": 0.9, "weight_decay": 5e-4}, 0.03
    return Material(
        training, held_out, build, loss, error, outputs, optimizer, 640, lambda a, b: match_chain(a, b)[0]
    )  # fmt: skip


def text(noise: float, seed: int) -> Material:
    """Llamas of two blocks on 512 pieces of Python's language reference, 32 bytes each, and 128 held-out ones.

    AdamW with weight decay 0.1 at rate 3e-3 (ours). The outputs of CKA are the logits of every position. noise: see
    `relabelled`; the bytes that the model reads stay as they are.
    """
    task = task_named("text")
    drawn = [task.draw(count, part, {"length": LENGTH}) for count, part in ((PIECES, 0), (PIECES // 4, 1))]
    training, held_out = ({"input_ids": one.inputs, "labels": one.inputs} for one in drawn)
    training["labels"] = relabelled(training["labels"], drawn[0].vocabulary, noise, seed)

    def build(width: int, seed: int) -> nn.Module:
        if width % (2 * HEADS):
            raise TransectError(f"a language model's width should be a multiple of {2 * HEADS}, not {width}")
        sizes = {"hidden": width, "blocks": BLOCKS, "heads": HEADS, "neurons": 4 * width}
        return built("llama", {}, {}, {**sizes, "vocabulary": drawn[0].vocabulary, "length": LENGTH}, seed=seed)

    def outputs(model: Any, batch: Rows) -> Tensor:
        return predictions(model, batch)[0]

    def error(model: Any, batch: Rows) -> tuple[Tensor, float]:
        logits, labels = predictions(model, batch)
        return (logits.argmax(-1) != labels).sum(), len(labels)

    return Material(
        training, held_out, build, own_loss, error, outputs, ("adamw", {"weight_decay": 0.1}, 3e-3), 64
    )  # fmt: skip


MATERIALS = {"digits": digits, "text": text}


def relabelled(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """The labels, of which so many, drawn at random, are another class than they were, each as likely as the next."""
    generator = torch.Generator().manual_seed(seed)
    flat = labels.flatten().clone()
    chosen = torch.randperm(len(flat), generator=generator)[: round(share * len(flat))]
    flat[chosen] = (flat[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    return flat.view_as(labels)


def recipe(
    material: Material,
    temperature: Temperature,
    batch_size: int,
    rate: float,
    epochs: int,
    products: int,
    curve_epochs: int,
    device: str,
) -> Recipe:
    """Train on the material for so many epochs, each in an order of its own.

    temperature: which of the two it is; the other is the same everywhere. rate: 0 for the material's own. It rises in a
    line for 30 % of the steps and falls along a cosine (the zoo's one-cycle), and gradients are not clipped. products,
    curve_epochs: see `Measures`.
    """
    training, held_out = (
        {name: one.to(device) for name, one in part.items()} for part in (material.training, material.held_out)
    )
    optimizer, options, own = material.optimizer

    def trained(model: nn.Module, _: int, hot: float, seed: int) -> None:
        size, largest = (int(hot), rate or own) if temperature == "batch-size" else (batch_size, hot)
        refuse_batch(size, material)
        count = len(training["labels"])
        per_epoch = math.ceil(count / size)

        @lru_cache(maxsize=1)
        def order(epoch: int) -> Tensor:
            draw = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            return torch.randperm(count, generator=draw).to(device)

        def loss(number: int) -> tuple[Tensor, float]:
            chosen = order(problem.at // per_epoch)[number * size : (number + 1) * size]
            return material.loss(model, {name: one[chosen] for name, one in training.items()})

        problem = Problem("cell", dict(model.named_parameters()), range(per_epoch), loss, None, model.train)
        schedule = Schedule(
            largest, epochs, warm_up=0.3, clip=None, optimizer=optimizer, options=options, seed=seed, shuffle=False
        )  # fmt: skip
        train(problem, Run(schedule, Machine(device), State(None)), {})

    curved = cut(training, material.curved)[:1], cut(held_out, material.curved)[:1]
    measures = Measures(
        material.loss, material.error, material.outputs, cut(training, MEASURED), cut(held_out, MEASURED), curved,
        products, curve_epochs, material.match,
    )  # fmt: skip
    return Recipe(lambda width, seed: material.build(width, seed).to(device), trained, measures)


def refuse_batch(size: int, material: Material) -> None:
    """TransectError for a batch of more examples than there are."""
    count = len(material.training["labels"])
    if not 1 <= size <= count:
        raise TransectError(f"a batch of {size} examples is not to be had: there are {count} to train on")


def cut(rows: Rows, size: int) -> list[dict[str, Tensor]]:
    """The examples in their order, in batches of that size and a rest."""
    starts = range(0, len(rows["labels"]), size)
    return [{name: one[start : start + size] for name, one in rows.items()} for start in starts]
