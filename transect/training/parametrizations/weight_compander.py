"""Weight compander: every weight through a squashing curve (Cakaj et al. 2023, arXiv:2306.16993).

Of the paper only the abstract was at hand: one function for each weight, bounded, steep near zero, its parameters
learned if wanted. The arctangent and all starts are ours; so are the other curves, for comparison.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...errors import TransectError
from ...parameters import Range
from .registry import parametrization
from .stand_in import StandIn

Curve = Literal["arctan", "tanh", "softsign"]


def squash(curve: Curve, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """ψ(v), elementwise: odd, increasing, with slope a / b at 0. a, b > 0."""
    x = v / b
    if curve == "arctan":
        return a * torch.arctan(x)
    if curve == "tanh":
        return a * torch.tanh(x)
    return a * x / (1 + x.abs())


def unsquash(curve: Curve, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The v with ψ(v) = w, for |w| below the curve's limit."""
    x = w / a
    if curve == "arctan":
        return b * torch.tan(x)
    if curve == "tanh":
        return b * torch.arctanh(x)
    return b * x / (1 - x.abs())


LIMITS: dict[Curve, float] = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}  # what |ψ| stays below, over a


class Companded(StandIn):
    """Ŵ = ψ(V), with V (d_out x d_in) trained; a and b are stored as logarithms, one of each for the layer.

    At the start Ŵ is the layer's weight. See `weight_compander` for the settings.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, curve: Curve, headroom: float, slope: float, learned: bool
    ) -> None:
        super().__init__(weight, bias)
        largest = float(weight.abs().max())
        if not math.isfinite(largest) or largest == 0:
            raise TransectError("the weight is zero or not finite, so that no curve can be chosen by its size")
        self.curve: Curve = curve
        wide = weight.detach().double()
        a = torch.tensor(headroom * largest / LIMITS[curve], dtype=torch.float64)
        b = a / slope
        self.values = nn.Parameter(unsquash(curve, wide, a, b).to(weight.dtype))  # V
        self.log_a = nn.Parameter(a.log().float(), requires_grad=learned)
        self.log_b = nn.Parameter(b.log().float(), requires_grad=learned)

    @property
    def weight(self) -> Tensor:
        wide = self.values if self.values.dtype == torch.float64 else self.values.float()
        return squash(self.curve, wide, self.log_a.exp(), self.log_b.exp()).to(self.values.dtype)


@parametrization("weight-compander", paper="arXiv:2306.16993", rate=5e-5)
def weight_compander(
    weight: Tensor, bias: Tensor | None, *, curve: Curve = "arctan",
    headroom: Annotated[float, Range(1, above=True)] = 1.5, slope: Annotated[float, Range(0, above=True)] = 1.5,
    learned: bool = True,
) -> Companded:  # fmt: skip
    """Each weight is ψ(v) = a arctan(v / b) of a trained number v: large ones are limited, small ones pushed from zero.

    The curve is folded into the weights at the end. A step of v moves a weight near zero a / b times as far as a step
    of the weight itself would under Adam, (a / b)² times under plain gradient descent: compare at each one's best rate.
    The formula is ours; see the module.

    curve: arctan, tanh or softsign.
    headroom: the limit of a weight's size, over the largest that the layer has at the start.
    slope: a / b, the curve's slope at zero at the start; above 1 small weights are spread.
    learned: train a and b of each layer, too, at the same rate as everything else.
    """
    return Companded(weight, bias, curve, headroom, slope, learned)
