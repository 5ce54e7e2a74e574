"""GR-KAN: trained rational functions in front of each matrix (Yang & Wang, ICLR 2025, arXiv:2409.10594).

The one form that is evaluated is F(x) = P(x) / (1 + Σ |b_j| |x|^j), whose denominator is at least 1; the released
kernels have it too, their fitting script another, to which the coefficients of their "gelu" belong.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...arguments import Range
from ...errors import TransectError
from ..part import MLPPart

Start = Literal["identity", "swish", "gelu"]
NUMERATOR, DENOMINATOR = 6, 4  # how many coefficients each has
# Numerator (x^0 ... x^5) and denominator (x^1 ... x^4) of the published starts, and the gain 1 / E[F(x)²], x ~ N(0, 1),
# by quadrature (the published 2.819 and 2.358 were sampled).
COEFFICIENTS: dict[Start, tuple[tuple[float, ...], tuple[float, ...], float]] = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), 1.0),
    "swish": (
        (3.05488e-7, 0.500001, 0.249998, 0.0532663, 0.00580303, 0.000275196),
        (-4.11155e-6, 0.106529, -1.269e-6, 0.000550233),
        2.811,
    ),
    "gelu": (
        (-0.00124236, 0.508050, 0.415864, 0.130227, 0.0243559, 0.00290284),
        (-0.0667502, 0.179276, 0.0374668, 1.65616e-10),
        2.352,
    ),
}


class Rational(nn.Module):
    """F_g(x) for each group g of neighbouring channels: one numerator for all, a denominator for each. In float32.

    channels: how many; groups divides it. start: which function it is before training.
    """

    def __init__(self, channels: int, groups: int, start: Start) -> None:
        super().__init__()
        if channels % groups:
            raise TransectError(f"{groups} groups do not divide {channels} channels; choose another number of groups")
        numerator, denominator, _ = COEFFICIENTS[start]
        self.groups = groups
        self.numerator = nn.Parameter(torch.tensor(numerator))  # a
        self.denominator = nn.Parameter(torch.tensor(denominator).repeat(groups, 1))  # b (groups x 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (self.groups, -1))
        above = torch.zeros_like(wide)
        for coefficient in reversed(self.numerator.to(wide.dtype)):  # Horner's rule
            above = above * wide + coefficient
        # |b| with the gradient of +0 at 0, so that a denominator that begins at 0 can leave it (as the kernels do).
        b = self.denominator.to(wide.dtype)
        b = torch.where(b >= 0, b, -b)
        size, below = wide.abs(), torch.zeros_like(wide)
        for power in range(b.shape[1] - 1, -1, -1):
            below = (below + b[:, power, None]) * size
        return (above / (1 + below)).flatten(-2).to(x.dtype)


class GRKAN(MLPPart):
    """down(F₂(up(F₁(x)))): rational functions of groups of channels in front of both matrices.

    F₁ begins as the identity, so that with F₂ at its start this is the MLP whose function F₂ stands for. The matrices
    begin with the variance that keeps that of the stream, gain / d_in (Section 4.3).

    groups: of neighbouring channels that share a denominator; it divides both widths.
    start: what F₂ is before training.
    gated: with a third matrix, down(F₂(gate(F₁(x))) * up(F₁(x))), as today's MLPs have it (ours).
    bias: of the matrices.
    """

    kind = "mlp.kat"
    paper = "arXiv:2409.10594"
    limit = "with F₁ the identity and F₂ the MLP's function it is that MLP"
    roles = {"down": "down_proj"}

    def __init__(
        self, width: int, neurons: int, *, groups: Annotated[int, Range(1, 2**20)] = 8,
        start: Literal["swish", "gelu"] = "swish", gated: bool = False, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.before = Rational(width, groups, "identity")
        self.gate_proj = nn.Linear(width, neurons, bias=bias) if gated else None
        self.up_proj = nn.Linear(width, neurons, bias=bias)
        self.between = Rational(neurons, groups, start)
        self.down_proj = nn.Linear(neurons, width, bias=bias)
        for linear, gain in ((self.gate_proj, 1.0), (self.up_proj, 1.0), (self.down_proj, COEFFICIENTS[start][2])):
            if linear is not None:
                nn.init.normal_(linear.weight, std=math.sqrt(gain / linear.in_features))
                if bias:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.gate_proj is None:
            return self.down_proj(self.between(self.up_proj(x)))
        return self.down_proj(self.between(self.gate_proj(x)) * self.up_proj(x))
