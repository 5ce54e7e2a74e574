"""TangleNAS: sizes by gradient in one entangled super-network (Sukthanker et al. 2024, arXiv:2312.10440)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from ....forward import Batch
from ....parameters import Range
from ....training import Problem, train
from ...registry import searching
from ...super_network import Mixing, Norm, SuperNetwork
from ...task import Found, Task
from .samplers import SAMPLERS, SamplerName, pull

HOT, COLD = 10.0, 0.1  # temperatures of GDAS, from the first step to the last


class Sizes:
    """The architecture numbers α of every axis, how β is drawn from them, and the two losses of a step."""

    def __init__(self, task: Task, network: SuperNetwork, sampler: SamplerName, distance: float, decay: float) -> None:
        self.task, self.network, self.sampler = task, network, SAMPLERS[sampler]
        self.distance, self.decay = distance if sampler == "drnas" else 0.0, decay
        self.temperature = HOT
        model, axes = task.space.anatomy.model, task.space.axes
        generator = torch.Generator().manual_seed(task.settings.seed)
        self.alphas = {
            name: nn.Parameter((1e-3 * torch.randn(len(axis.choices), generator=generator)).to(model.device))
            for name, axis in axes.items()
        }
        self.trained = list(model.parameters()) if task.settings.lr > 0 else []
        self.validation = [batch for batch in task.validation if batch is not None]

    def draw(self) -> dict[str, Tensor]:
        """One β for each axis: layers that share an axis share the sample."""
        return {name: self.sampler.draw(alpha, self.temperature) for name, alpha in self.alphas.items()}

    @property
    def means(self) -> dict[str, Tensor]:
        """E β of each axis."""
        return {name: self.sampler.mean(alpha) for name, alpha in self.alphas.items()}

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The training loss, with its gradient to the weights, and the validation loss's gradient to α.

        A validation batch is drawn for each step. The sum shown is that of the training batch.
        """
        for parameter in self.trained:
            parameter.requires_grad_(False)
        chosen = self.validation[int(torch.randint(len(self.validation), ()))]
        summed, count = self.network.loss(self.draw(), chosen)
        if not self.trained:
            return summed, count
        mean = summed / count
        for parameter in self.trained:
            parameter.requires_grad_(True)
        summed, count = self.network.loss({name: beta.detach() for name, beta in self.draw().items()}, batch)
        return summed + count * (mean - mean.detach()), count

    def penalty(self, batch: Batch) -> Tensor:
        """The price of the expected size, the pull to the flat start, and half the decay times |α|²."""
        terms = [self.task.price(self.task.space.numbers(self.means))]
        for alpha in self.alphas.values():
            wide = alpha.double().cpu()
            terms += [self.distance * pull(wide), 0.5 * self.decay * wide.square().sum()]
        return torch.stack(terms).sum()

    def cool(self, step: int, steps: int) -> None:
        """After so many of the steps."""
        self.temperature = HOT + (COLD - HOT) * step / steps

    def put_back(self, temperature: float) -> None:
        """Go on with this temperature."""
        self.temperature = temperature


@searching("tanglenas", paper="arXiv:2312.10440")
def tanglenas(
    task: Task, *, sampler: SamplerName = "drnas", size_rate: Annotated[float, Range(0, above=True)] = 0.02,
    mixing: Mixing = "weights", norm: Norm = "choice", distance: Annotated[float, Range(0)] = 1e-3,
    decay: Annotated[float, Range(0)] = 1e-3,
) -> Found:  # fmt: skip
    """Sizes by gradient: every layer runs once, with the sum of all its slices, weighted by what is learned of them.

    In each step the weights follow the loss of a training batch, and the architecture numbers that of a validation
    batch plus the penalty, each for a draw of its own, first order. Both take their step together, where the paper
    takes one after the other. The largest weight of each axis wins; with `keep`, the likeliest that fits.

    sampler: drnas draws from a Dirichlet distribution; gdas takes one choice, straight through; darts is sparsemax.
    size_rate: largest learning rate of the architecture numbers. The paper's 3e-4 is for thousands of steps.
    mixing: of an MLP, the weights on both sides of its hidden units, or its outputs.
    norm: over a stream that is searched, normalise over each width (choice) or, as the paper does, over the full one.
    distance: weight of the pull to the flat distribution, for drnas.
    decay: of the architecture numbers, by an L2 penalty.
    """
    network = SuperNetwork(task.space, mixing, norm)
    sizes = Sizes(task, network, sampler, distance, decay)
    settings = task.settings
    schedule = settings.schedule(settings.lr or size_rate)
    steps = schedule.total(len(task.training))
    model = task.space.anatomy.model
    parameters = {f"sizes.{name}": alpha for name, alpha in sizes.alphas.items()}
    rates = {name: size_rate / schedule.lr for name in parameters}
    if settings.lr > 0:
        model.requires_grad_(True)
        parameters |= dict(model.named_parameters())
    problem = Problem(
        "tanglenas", parameters, task.training, sizes.loss, None, model.train,
        tokens=task.tokens, penalty=sizes.penalty, rates=rates,
        after_step=lambda step, optimizer: sizes.cool(step, steps),
        held=lambda: {"temperature": torch.tensor(sizes.temperature, dtype=torch.float64)},
        put_back=lambda held: sizes.put_back(float(held["temperature"])),
    )  # fmt: skip
    course = train(problem, task.run(schedule), {})
    with torch.no_grad():
        weights = {name: mean.detach() for name, mean in sizes.means.items()}
    told = {name: mean.double().clamp_min(1e-12).log().tolist() for name, mean in weights.items()}
    likeliest = {name: int(mean.argmax()) for name, mean in weights.items()}
    picked = task.space.fitted(likeliest, settings.keep, lambda name, index: -told[name][index])
    return Found(picked, course, weights, network, {"numbers_likeliest": task.space.size(likeliest)})
