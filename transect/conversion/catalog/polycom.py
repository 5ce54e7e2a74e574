"""PolyCom (Zhuo et al., ICLR 2025, arXiv:2411.03884): polynomials in place of the trained MLP's own function."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...anatomy import Anatomy
from ...parameters import block_numbers
from ...parts import insert
from ...parts.catalog.polycom import Polynomial
from ...parts.insert import places
from ..inputs import inputs_of_modules
from ..mlp import trained_mlp
from ..registry import Calibration, Range, conversion
from ..stage import Stage

CHUNK = 64  # positions whose powers are there at once


@torch.no_grad()
def fit_polynomial(polynomial: Polynomial, x: Tensor, y: Tensor) -> float:
    """Give the polynomial the coefficients with which it is nearest to y; the error over the size of y.

    x, y: (positions x neurons). Least squares over all numbers, solved in float64 from sums over the positions.
    """
    count = len(polynomial.coefficients)
    gram, sums, size = torch.zeros(count, count).double(), torch.zeros(count).double(), 0.0
    for given, wanted in zip(x.double().split(CHUNK), y.double().split(CHUNK), strict=True):
        columns = torch.stack([torch.ones_like(given), *polynomial.powers(given)]).flatten(1).cpu()
        gram += columns @ columns.mT
        sums += columns @ wanted.flatten().cpu()
        size += float(wanted.square().sum())
    scale = gram.diagonal().sqrt().clamp_min(1e-30)  # powers differ in size by orders
    found = torch.linalg.lstsq(gram / scale[:, None] / scale, (sums / scale)[:, None], driver="gelsd").solution[:, 0]
    found = found / scale
    polynomial.coefficients.copy_(found)
    left = size - 2 * float(found @ sums) + float(found @ gram @ found)
    return (max(0.0, left) / max(size, 1e-30)) ** 0.5


def is_relu(function: nn.Module) -> bool:
    """Whether it gives what ReLU gives, on numbers of all sizes; not where it knows which neuron is which."""
    if getattr(function, "of_neurons", False):
        return False
    x = torch.cat([torch.linspace(-20, 20, 401), torch.tensor([-1e4, 1e4])])
    return torch.equal(function(x), functional.relu(x))


def _check(anatomy: Anatomy, layers: str, **_: Any) -> None:
    for number in block_numbers(layers, anatomy.blocks):
        places(anatomy, "activation", number)
        trained_mlp(anatomy.blocks[number])


@conversion(
    "polycom",
    paper="arXiv:2411.03884",
    group="rewrites and starts",
    exact="a model whose function is ReLU is what it was, with PolyReLU",
    check=_check,
    stages=(Stage("polycom", train="full", lr=1e-4),),
    causal=False,
)
@torch.no_grad()
def polycom(
    anatomy: Anatomy, calibration: Calibration, *, kind: Literal["poly-relu", "poly-norm"] = "poly-relu",
    order: Annotated[int, Range(1, 16)] = 3, layers: str = "",
) -> None:  # fmt: skip
    """The function of each MLP becomes a polynomial with trained coefficients; matrices, and gates, stay.

    It begins as the least squares fit to what the function makes of the values that it gets on the data; ReLU is
    represented exactly, without data. How near it is, is said: the error over the size of what the function gives, both
    root mean square, of the worst block. The order of the paper is a polynomial of relu(x), or of powers of x that are
    each normed over the neurons. All blocks are then trained.

    kind: poly-relu or poly-norm.
    order: the highest power.
    layers: only these blocks, such as 0-5,7; default all.
    """
    chosen = block_numbers(layers, anatomy.blocks)
    functions: dict[int, Any] = {number: trained_mlp(anatomy.blocks[number]).activation for number in chosen}
    exact = {number for number in chosen if kind == "poly-relu" and is_relu(functions[number])}
    fitted = {number: functions[number] for number in chosen if number not in exact}
    seen = inputs_of_modules(anatomy, fitted, calibration.batches) if fitted else {}
    insert(anatomy.model, "activation", kind, layers=chosen, settings={"order": order}, seed=calibration.seed)
    worst = 0.0
    for number in chosen:
        part: Any = trained_mlp(anatomy.blocks[number]).activation
        if number in exact:
            part.polynomial.coefficients.zero_()
            part.polynomial.coefficients[1] = 1
        else:
            x = seen[number]
            worst = max(worst, fit_polynomial(part.polynomial, x, functions[number](x)))
    calibration.told["error of the fitted polynomial over the function's size, worst block"] = worst
