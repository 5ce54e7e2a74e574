"""Training small models inside a claim."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..statistics import Progress
from ..training import Machine, Problem, Run, Schedule, Shape, State, train


def descend(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    weight_decay: float = 0.1,
    progress: Progress | None = None,
    *,
    warm_up: float = 0.1,
    shape: Shape = "cosine",
) -> None:
    """Train every parameter with AdamW; the module is in eval mode afterwards.

    loss: step -> scalar. rate: the highest, after a linear warm-up over that share of the steps; then a cosine to zero,
    or another shape. Gradients are clipped to length 1. Diverged if the loss is not finite any more.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    schedule = Schedule(
        lr=rate, warm_up=warm_up, shape=shape, options={"weight_decay": weight_decay}, shuffle=False
    )  # fmt: skip
    problem = Problem("training", parameters, range(steps), lambda step: (loss(step), 1), None, module.train)
    machine = Machine(next(iter(parameters.values())).device)
    train(problem, Run(schedule, machine, State(None), progress), {})
    module.eval()
