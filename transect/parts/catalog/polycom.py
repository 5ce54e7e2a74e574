"""Polynomial composition activations: PolyReLU and PolyNorm (Zhuo et al., ICLR 2025, arXiv:2411.03884)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..part import Activation, MLPPart
from ..precision import wide

Order = Annotated[int, Range(1, 16)]


class Polynomial(nn.Module):
    """Σ a_i p_i(x) over i = 0 ... r, with p_0 = 1; at the start a_0 = 0 and all others 1/r. In float32 or wider.

    `coefficients` holds a_0 ... a_r in this order; the authors' checkpoints store the cube's first.
    """

    def __init__(self, order: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.full((order + 1,), 1 / order))
        with torch.no_grad():
            self.coefficients[0] = 0

    def powers(self, x: Tensor) -> list[Tensor]:
        """p_1(x) ... p_r(x)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TransectError(f"a polynomial of {x.dtype} would lose its fractions: give it floating point numbers")
        given = wide(x)
        a = self.coefficients.to(given.dtype)
        total = a[0].expand_as(given)
        for power, factor in zip(self.powers(given), a[1:], strict=True):
            total = total + factor * power
        return total.to(x.dtype)


class ReLUPowers(Polynomial):
    """p_i = relu(x)^i."""

    def powers(self, x: Tensor) -> list[Tensor]:
        base = functional.relu(x)
        return [base**i for i in range(1, len(self.coefficients))]


class NormedPowers(Polynomial):
    """p_i = x^i / sqrt(mean((x^i)²) + eps), the mean over the last dimension."""

    def __init__(self, order: int, eps: float) -> None:
        super().__init__(order)
        self.eps = eps

    def powers(self, x: Tensor) -> list[Tensor]:
        if x.shape[-1] == 0:
            raise TransectError("a polynomial of no neurons has no norm: give it at least one")
        found = [x**i for i in range(1, len(self.coefficients))]
        return [power * (power.square().mean(-1, keepdim=True) + self.eps).rsqrt() for power in found]


class PolyReLU(Activation):
    """A polynomial of relu(x) with trained coefficients, the same for all neurons of a layer.

    order: of the polynomial, r.
    """

    kind = "activation.poly-relu"
    paper = "arXiv:2411.03884"
    limit = "with coefficients 0, 1, 0, 0 it is relu, with 0, 0, 1, 0 its square"

    def __init__(self, *, order: Order = 3) -> None:
        super().__init__()
        self.polynomial = ReLUPowers(order)

    def forward(self, x: Tensor) -> Tensor:
        return self.polynomial(x)


class PolyNorm(Activation):
    """A sum of powers of x, each normed over the neurons, with trained coefficients.

    order: the highest power, r.
    eps: in the norms.
    """

    kind = "activation.poly-norm"
    paper = "arXiv:2411.03884"
    limit = "none: every value depends on all neurons"
    of_neurons = True  # without one the others have another norm

    def __init__(self, *, order: Order = 3, eps: Annotated[float, Range(0)] = 1e-6) -> None:
        super().__init__()
        self.polynomial = NormedPowers(order, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.polynomial(x)


class _PolyMLP(MLPPart):
    """down(polynomial(up x)): two matrices and no gate, as the paper has it."""

    paper = "arXiv:2411.03884"
    roles = {"up": "up_proj", "down": "down_proj"}

    def __init__(self, width: int, neurons: int, polynomial: Polynomial) -> None:
        super().__init__()
        if neurons < 1:
            raise TransectError(f"{neurons} neurons are none to apply a polynomial to: choose at least one")
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=False)
        self.polynomial = polynomial

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.polynomial(self.up_proj(x)))


class PolyReLUMLP(_PolyMLP):
    """Two matrices with a polynomial of relu between them.

    order: of the polynomial.
    """

    kind = "mlp.poly-relu"
    limit = "with coefficients 0, 1, 0, 0 it is the MLP with relu"

    def __init__(self, width: int, neurons: int, *, order: Order = 3) -> None:
        super().__init__(width, neurons, ReLUPowers(order))


class PolyNormMLP(_PolyMLP):
    """Two matrices with a sum of normed powers between them.

    order: the highest power.
    eps: in the norms.
    """

    kind = "mlp.poly-norm"
    limit = "none: the powers are normed over the neurons"

    def __init__(self, width: int, neurons: int, *, order: Order = 3, eps: Annotated[float, Range(0)] = 1e-6) -> None:
        super().__init__(width, neurons, NormedPowers(order, eps))
