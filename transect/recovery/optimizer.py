"""AdamW over full-precision copies of the trained numbers, with a learning rate that is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .trained import Parameters

WARM_UP = 0.05  # share of the steps in which the learning rate rises
CLIP = 1.0  # largest norm of a step's gradient
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW without weight decay (our choice: a repair should not pull weights to zero).

    A parameter of less than 32 bits is optimised as a float32 copy and rounded after every step: in bfloat16 itself
    most updates would be lost, as they are smaller than the distance to the next number.

    peak: the largest learning rate. total: number of steps.
    """

    def __init__(self, parameters: Parameters, peak: float, total: int) -> None:
        self.parameters, self.peak, self.total = parameters, peak, total
        self.masters = {
            name: nn.Parameter(p.detach().float().clone()) if p.element_size() < 4 else p
            for name, p in parameters.items()
        }
        self.adamw = torch.optim.AdamW(self.masters.values(), lr=peak, weight_decay=0.0)

    def rate(self, step: int) -> float:
        """Learning rate of step 0 ... total - 1: a linear rise, then half a cosine down."""
        rising = math.ceil(WARM_UP * self.total)
        if step < rising:
            return self.peak * (step + 1) / rising
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.total - rising)))

    @torch.no_grad()
    def step(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Take a step along the gradients, of which the norm is limited first."""
        for name, master in self.masters.items():
            master.grad = gradients[name].to(master)
        nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        self.adamw.param_groups[0]["lr"] = self.rate(step)
        self.adamw.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
            parameter.grad = self.masters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything from which `load` goes on, by name."""
        tensors = {f"master|{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            moments = self.adamw.state[master]
            tensors |= {f"{moment}|{name}": moments[moment] for moment in _MOMENTS if moments}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave: masters, the weights made of them, and the moments."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master|{name}"])
            self.parameters[name].copy_(master)
            if f"exp_avg|{name}" in tensors:
                stored = {moment: tensors[f"{moment}|{name}"] for moment in _MOMENTS}
                self.adamw.state[master] = {
                    moment: tensor.clone() if moment == "step" else tensor.to(master, copy=True)
                    for moment, tensor in stored.items()
                }
