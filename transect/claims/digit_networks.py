"""Plain networks that read handwritten digits, for claims about networks of any kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tasks.digits import shuffled
from .descent import descend

HELD_OUT, BATCH = 360, 64
Images = tuple[Tensor, Tensor]  # n x 64 grey values from -1 to 1, and what they show


@lru_cache
def digit_images() -> tuple[Images, Images]:
    """Those to train on, and those held out."""
    pixels, classes, order = shuffled()
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    return (pixels[rest].flatten(1), classes[rest]), (pixels[held].flatten(1), classes[held])


def network(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU in between, in random numbers of the seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def train_digits(
    model: nn.Sequential, steps: int, seed: int, corrupt: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    images: Images | None = None, rate: float = 3e-3,
) -> nn.Sequential:  # fmt: skip
    """Train it, in place, to name the digits. corrupt: what happens to a batch of images, with its random numbers."""
    pixels, classes = images or digit_images()[0]
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        shown = pixels[chosen] if corrupt is None else corrupt(pixels[chosen], generator)
        return functional.cross_entropy(model(shown), classes[chosen])

    descend(model, loss, steps, rate, weight_decay=0.0)
    return model


@torch.no_grad()
def digit_loss(model: nn.Module, images: Images) -> float:
    """Nats a digit."""
    return float(functional.cross_entropy(model(images[0]), images[1]))


@torch.no_grad()
def digit_accuracy(model: nn.Module, images: Images) -> float:
    """Share of the digits that are named right."""
    return float((model(images[0]).argmax(-1) == images[1]).double().mean())
