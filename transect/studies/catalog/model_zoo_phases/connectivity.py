"""Whether two models of one shape are joined by a curve of low loss: a Bezier curve with one point in between, trained.

Garipov et al. 2018 (arXiv:1802.10026): θ(t) = (1-t)² θ_1 + 2t(1-t) φ + t² θ_2, where φ lowers the loss at random t and
the ends stay. The measure of the model zoo (arXiv:2504.18072): with M = (L(0) + L(1)) / 2 and t* where L is farthest
from M, mc = M - L(t*). Negative: the highest point is a barrier. Near 0: joined. Positive: it is better in between, the
ends are trained too little.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ....errors import TransectError
from ....forward import at_rest
from ....merging.curve import points_of
from ....merging.shares import mean_of
from ....training import Course, Machine, Problem, Run, Schedule, State, train
from .losses import Loss, mean_loss

POINTS = 21  # the zoo has 5, which may step over a narrow barrier
Path = Callable[[float], dict[str, Tensor]]  # t from 0 to 1 -> the numbers by name


def bezier(first: Mapping[str, Tensor], bend: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> Path:
    """The curve from `first` to `last` that `bend` draws to itself; its ends are theirs bit for bit."""
    return lambda t: mean_of((first, bend, last), ((1 - t) ** 2, 2 * t * (1 - t), t**2))


def straight(first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> Path:
    """The straight line from `first` to `last`."""
    return lambda t: mean_of((first, last), (1 - t, t))


def mode_connectivity(values: Tensor) -> float:
    """mc of what was measured at evenly spaced t (points), a loss or an error; see the top of the file.

    The ends count, too: where they differ by more than anything in between, mc is below 0 by half of that.
    """
    middle = (values[0] + values[-1]) / 2
    return float(middle - values[(values - middle).abs().argmax()])


@dataclass(frozen=True)
class Joined:
    """A trained curve. losses, on_the_line: mean training loss at evenly spaced t (points), along the curve and along
    the straight line between its ends. bend: φ by name. course: how its training went."""

    losses: Tensor
    on_the_line: Tensor
    bend: dict[str, Tensor]
    course: Course

    @property
    def connectivity(self) -> float:
        """mc along the curve, in units of the loss."""
        return mode_connectivity(self.losses)


def bezier_connectivity(
    first: nn.Module,
    second: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    epochs: int = 10,
    rate: float = 0.1,
    momentum: float = 0.9,
    decay: float = 5e-4,
    points: int = POINTS,
    seed: int = 0,
) -> Joined:
    """Train φ between two models of one shape, and measure the curve. The models stay as they are.

    batches: of training data, taken in a new order every epoch (the zoo: 10 epochs of batches of 128). φ starts half
    way. Each batch is at its own t, uniform in (0, 1), and lowers the mean loss + decay/2 ‖θ(t)‖², by SGD; the rate is
    constant for half of the steps, falls in a line to 1 % at 90 % of them, and stays there. (In the released code the
    factor of every epoch is multiplied onto the one before, so that the rate is all but 0 from 80 % on; we take the
    schedule that it means.) Measured is the loss alone, where that code adds the decay's term, which is lowest half way
    because weights average out: mc would be too large by it.
    Layers with running statistics estimate them at every t, ends included, on these batches.
    Memory: four times the model. Time: epochs passes forward and back, and 4 * points forward at the most.
    Raises TransectError for models that do not fit (see `check_alike`) and Diverged if the loss is not finite any more.
    """
    check_alike(first, second)
    carrier = _carrier(first)
    device = next(carrier.parameters()).device
    ends = [{name: one.detach().to(device) for name, one in model.named_parameters()} for model in (first, second)]
    bend = {name: nn.Parameter(one) for name, one in straight(*ends)(0.5).items()}
    path, at = bezier(ends[0], bend, ends[1]), {}
    called = _Loss(carrier, loss)

    def lowered(batch: Any) -> tuple[Tensor, float]:
        at.update(path(float(torch.rand(()))))  # the loop seeds torch's numbers anew for every step
        return functional_call(called, {f"model.{name}": one for name, one in at.items()}, (batch,))

    def penalty(_: Any) -> Tensor:
        return decay / 2 * torch.stack([one.square().sum() for one in at.values()]).sum()

    problem = Problem("curve", bend, batches, lowered, None, carrier.train, penalty=penalty)
    schedule = Schedule(
        rate, epochs, warm_up=0, shape="late", clip=None, optimizer="sgd", options={"momentum": momentum}, seed=seed
    )  # fmt: skip
    course = train(problem, Run(schedule, Machine(device), State(None)), {})
    found = {name: one.detach() for name, one in bend.items()}
    along = [
        losses_along(way, first, loss, batches, points) for way in (bezier(ends[0], found, ends[1]), straight(*ends))
    ]
    return Joined(along[0], along[1], found, course)


def losses_along(
    path: Path,
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    points: int = POINTS,
    estimated_on: Sequence[Any] | None = None,
) -> Tensor:
    """The mean of any loss, or of errors, at so many evenly spaced t along a path (points), float64.

    model: one of the shape, which stays as it is. estimated_on: what norms take their statistics from; default: the
    same batches.
    """
    between, found = _carrier(model), []
    with torch.no_grad():
        for t in points_of(points):
            for name, tensor in path(t).items():
                between.get_parameter(name).copy_(tensor)
            estimate_norms(between, loss, batches if estimated_on is None else estimated_on)
            found.append(mean_loss(between, loss, batches))
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def estimate_norms(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> None:
    """Let layers with running statistics (batch norm) take them anew, as the mean over these batches.

    Everything else is in evaluation mode meanwhile: nothing is dropped.
    """
    norms: list[Any] = [one for one in model.modules() if isinstance(getattr(one, "running_mean", None), Tensor)]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    with at_rest(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch then takes the mean over all batches
            norm.train()
        for batch in batches:
            loss(model, batch)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def check_alike(first: nn.Module, second: nn.Module) -> None:
    """TransectError where the names or shapes of two models' parameters are not the same, which says what is not."""
    shapes = [{name: tuple(one.shape) for name, one in model.named_parameters()} for model in (first, second)]
    if shapes[0] == shapes[1]:
        return
    name = min(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    here, there = (each.get(name, "missing") for each in shapes)
    raise TransectError(
        f"the models of a pair should have the same parameters, and {name!r} is {here} in one and {there} in the "
        "other: compare models of one architecture and size, trained from different seeds"
    )


def _carrier(model: nn.Module) -> nn.Module:
    """A copy to write numbers into, wide enough to hold what lies between two of 16 bits."""
    carrier = copy.deepcopy(model)
    narrow = any(one.is_floating_point() and one.element_size() < 4 for one in carrier.parameters())
    return carrier.float() if narrow else carrier


class _Loss(nn.Module):
    """A model's loss as a module's forward, so that it can be called with other numbers in the model's place."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> tuple[Tensor, float]:
        return self.loss(self.model, batch)
