"""A small ReLU network on made-up data: trained, pruned by magnitude, fine-tuned with a penalty, and attacked.

Sizes, data, attack and rates are our choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....spectra import condition_number, singular_values
from ...descent import descend
from ..lazy_neuron.relu_classifier import CLASSES, FEATURES, Examples

WIDTH = 64
PRUNED = 0.9  # share of each layer's weights
STEPS, MORE, BATCH, RATE = 600, 300, 128, 2e-3  # of training, of fine-tuning; examples in a step; the rate of both
ATTACK = 0.1  # change of every input; their standard deviation is about 1.4
_LOOKED_AT = 500  # test examples at which the local Lipschitz constant is taken


@dataclass(frozen=True)
class Way:
    """A fine-tuning: what is added to the loss of the pruned weights, how much, and whether on the classifier alone."""

    name: str
    form: Callable[[Tensor], Tensor] | None = None
    weight: float = 0.0
    only_classifier: bool = False


class Network(nn.Module):
    """x (n x FEATURES) -> logits (n x CLASSES), through two hidden layers. Pruned entries stay 0."""

    def __init__(self) -> None:
        super().__init__()
        shapes = list(pairwise((FEATURES, WIDTH, WIDTH, CLASSES)))
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out) for d_in, d_out in shapes)
        for number, (d_in, d_out) in enumerate(shapes):
            self.register_buffer(f"mask{number}", torch.ones(d_out, d_in))

    @property
    def weights(self) -> list[Tensor]:
        """As they are used, the classifier's last."""
        return [layer.weight * self.get_buffer(f"mask{number}") for number, layer in enumerate(self.layers)]  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = [(weight, layer.bias) for weight, layer in zip(self.weights, self.layers, strict=True)]
        for weight, bias in hidden:
            x = torch.relu(functional.linear(x, weight, bias))  # type: ignore[arg-type]
        return functional.linear(x, *last)  # type: ignore[arg-type]


def pruned(weight: Tensor, share: float) -> Tensor:
    """Which entries stay (as numbers 0 and 1) where the smallest are pruned."""
    flat = torch.ones(weight.numel(), dtype=weight.dtype, device=weight.device)
    flat[weight.detach().abs().flatten().argsort()[: round(share * weight.numel())]] = 0
    return flat.view(weight.shape)


def trained(seed: int, examples: Examples) -> Network:
    """A dense network after STEPS steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
    _train(network, examples, STEPS, seed, Way("nothing"))
    return network


def fine_tuned(dense: Network, seed: int, examples: Examples, way: Way) -> Network:
    """A pruned copy after MORE steps."""
    network = copy.deepcopy(dense)
    for number, layer in enumerate(network.layers):
        network.get_buffer(f"mask{number}").copy_(pruned(layer.weight, PRUNED))  # type: ignore[arg-type]
    _train(network, examples, MORE, seed, way)
    return network


def _train(network: Network, examples: Examples, steps: int, seed: int, way: Way) -> None:
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(examples.labels), (BATCH,), generator=generator)
        value = functional.cross_entropy(network(examples.inputs[chosen]), examples.labels[chosen])
        if way.form is None:
            return value
        penalized = network.weights[-1:] if way.only_classifier else network.weights
        return value + way.weight * torch.stack([way.form(weight).float() for weight in penalized]).sum()

    descend(network, loss, steps, RATE, weight_decay=0.0)


def measured(network: Network, test: Examples) -> dict[str, float]:
    """Condition numbers, accuracies, and the mean over examples of the largest singular value of the Jacobian."""
    conditions = [float(condition_number(singular_values(weight.detach()))) for weight in network.weights]
    inputs = test.inputs.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(functional.cross_entropy(network(inputs), test.labels), inputs)
    attacked = test.inputs + ATTACK * slope.sign()
    some = test.inputs[:_LOOKED_AT]
    jacobian: Any = torch.func.vmap(torch.func.jacrev(network))(some)  # (_LOOKED_AT, CLASSES, FEATURES)
    return {
        "first": conditions[0], "second": conditions[1], "classifier": conditions[2],
        "accuracy": _accuracy(network, test.inputs, test.labels),
        "under attack": _accuracy(network, attacked, test.labels),
        "local Lipschitz": float(torch.linalg.matrix_norm(jacobian.detach(), 2).mean()),
    }  # fmt: skip


@torch.no_grad()
def _accuracy(network: Network, inputs: Tensor, labels: Tensor) -> float:
    return float((network(inputs).argmax(-1) == labels).double().mean())
