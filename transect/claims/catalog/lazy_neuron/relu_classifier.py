"""Small ReLU classifiers, trained inside claims on made-up data, and what is measured of them.

The paper trains ViTs on images. Here a class is a mixture of Gaussian clusters, drawn by a seeded generator. Sizes
are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....probes.catalog.lazy_neuron.topk import top_k
from ...descent import descend

CLASSES, CLUSTERS, FEATURES = 10, 8, 32  # clusters of a class
TRAINING, TEST = 2000, 4000  # examples
WIDTH, BLOCKS = 64, 2
STEPS, BATCH, RATE = 1000, 128, 2e-3
BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Examples:
    """inputs: n x FEATURES. labels: n."""

    inputs: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """Residual ReLU MLPs between two linear layers; before each MLP a LayerNorm.

    neurons: of each MLP. k: the active neurons that stay, of each example, as in `top_k`; all for k >= neurons.
    """

    def __init__(self, neurons: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.read, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(BLOCKS))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, neurons) for _ in range(BLOCKS))
        self.downs = nn.ModuleList(nn.Linear(neurons, WIDTH) for _ in range(BLOCKS))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.traced(inputs)[0]

    def traced(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (n x CLASSES), and the activations of each MLP (n x neurons)."""
        stream, seen = self.read(inputs), []
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            activations = torch.relu(up(norm(stream)))
            seen.append(top_k(activations, self.k) if self.k < activations.shape[-1] else activations)
            stream = stream + down(seen[-1])
        return self.head(stream), seen


def mixture(seed: int, noise: float = 0.0) -> tuple[Examples, Examples]:
    """Examples to train and to test on. noise: share of training labels that are drawn anew, from all classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES * CLUSTERS, FEATURES, generator=generator)
    made = []
    for count in (TRAINING, TEST):
        cluster = torch.randint(len(centres), (count,), generator=generator)
        scatter = torch.randn(count, FEATURES, generator=generator)
        made.append(Examples(centres[cluster] + scatter, cluster % CLASSES))
    drawn = torch.randint(CLASSES, (TRAINING,), generator=generator)
    wrong = torch.rand(TRAINING, generator=generator) < noise
    return Examples(made[0].inputs, torch.where(wrong, drawn, made[0].labels)), made[1]


def untrained(neurons: int, seed: int, k: int | None = None) -> Classifier:
    """A classifier with random weights, the same for the same seed. k: None for all neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(neurons, neurons if k is None else k)


def trained(neurons: int, seed: int, examples: Examples, k: int | None = None) -> Classifier:
    """A classifier after STEPS steps of AdamW on batches drawn from the examples, without weight decay."""
    model = untrained(neurons, seed, k)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(examples.labels), (BATCH,), generator=generator)
        return functional.cross_entropy(model(examples.inputs[chosen]), examples.labels[chosen])

    descend(model, loss, STEPS, RATE, weight_decay=0.0)
    return model


@torch.no_grad()
def densities(model: Classifier, examples: Examples) -> Tensor:
    """Share of the neurons that are active, mean over examples, by MLP (BLOCKS)."""
    return torch.stack([(activations > 0).double().mean() for activations in model.traced(examples.inputs)[1]])


@torch.no_grad()
def accuracy(model: Classifier, examples: Examples, scatter: float = 0.0) -> float:
    """Share of right answers. scatter: standard deviation of Gaussian noise on the inputs."""
    noise = torch.randn(examples.inputs.shape, generator=torch.Generator().manual_seed(0))
    return float((model(examples.inputs + scatter * noise).argmax(-1) == examples.labels).double().mean())


@torch.no_grad()
def calibration_error(model: Classifier, examples: Examples) -> float:
    """Expected calibration error on these examples, see `binned_error`."""
    confidence, answers = model(examples.inputs).double().softmax(-1).max(-1)
    return binned_error(confidence, answers == examples.labels)


def binned_error(confidence: Tensor, right: Tensor) -> float:
    """|confidence - accuracy| in BINS equal bins of confidence, mean over the bins by their examples.

    confidence: n, from 0 to 1. right: n, whether each answer was right.
    """
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence.double() - right.double())
    return float(sums.abs().sum() / len(confidence))
