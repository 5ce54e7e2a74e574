"""What a parametrization is made of: a module for each linear layer, and what all of them do together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...anatomy.storage import parameter_of
from ...operators import Operator


class StandIn(nn.Module):
    """Stands for a linear layer while it is trained: y = Ŵ x + b, where Ŵ comes from the numbers that are trained.

    A subclass calls `super().__init__(weight, bias)` with the layer's W (d_out x d_in) and b, holds its numbers as
    parameters, of which those that ask for no gradient stay as they are, and gives `weight`; or `forward` itself.
    Everything else that changes meanwhile is in buffers, which are kept with the parameters, so that an interrupted
    training goes on bit for bit.

    In evaluation mode it computes what `finished` will compute: the state that is best on the held-out text is judged
    as it will be stored.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else parameter_of(bias)

    @property
    def weight(self) -> Tensor:
        """Ŵ (d_out x d_in), with its gradient."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def penalty(self) -> Tensor | None:
        """What is added to the mean loss of a batch; a scalar, or None for nothing."""
        return None

    def after_step(self, gone: float) -> None:
        """Called before the first step and after each with the share of the steps that is done."""

    def finished(self) -> Tensor | Operator:
        """What stays: Ŵ as a matrix (d_out x d_in), or an operator without bias that stores it in fewer bytes."""
        with torch.no_grad():
            return self.weight.detach()


class Together(nn.Module):
    """What the stand-ins of one model do together. The default: each what it does by itself.

    A method that needs more derives from it. What it changes meanwhile is in buffers.
    stand_ins: by the name of the matrix. settings: of the method.
    """

    def __init__(self, stand_ins: Mapping[str, StandIn], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.stand_ins = dict(stand_ins)  # a plain dict: they are modules of the model
        self.settings = dict(settings)

    def penalty(self, again: Callable[[], Tensor]) -> Tensor | None:
        """What is added to the mean loss of a batch. again: runs the model once more on it, and gives its mean loss."""
        terms = [term for one in self.stand_ins.values() if (term := one.penalty()) is not None]
        return torch.stack([term.float() for term in terms]).sum() if terms else None

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Called with step 0 and no optimizer before the first of the steps, and then after each with its number."""
        for one in self.stand_ins.values():
            one.after_step(step / steps)

    def told(self) -> Mapping[str, float]:
        """What a user wants to know of the numbers besides the losses: words, and a number. Asked before `finish`."""
        return {}

    def finish(self, measure: Callable[[], float]) -> float | None:
        """Called when the numbers are those that stay, before the stand-ins are `finished`.

        measure: the loss on the held-out text, as the model is at the moment; NaN where there is none.
        Returns that loss of what is left, where something was decided by it, or None.
        """
