"""KAT (Yang & Wang, ICLR 2025, arXiv:2409.10594): the trained MLP with rational functions in place of its own."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from ...anatomy import MLP, Anatomy
from ...anatomy.storage import dense
from ...errors import TransectError
from ...parameters import block_numbers
from ...parts import insert
from ...parts.catalog.kat import COEFFICIENTS, DENOMINATOR, NUMERATOR, Rational
from ..inputs import inputs_of_modules
from ..mlp import check_mlps, fill, trained_mlp
from ..registry import Calibration, Range, conversion
from ..stage import Stage

INTERVAL, POINTS, TAIL = 3.0, 512, 0.1  # of the paper's fit; of ours, and the weight of those between the extremes


def fit_rational(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """a (6) and b (4), not negative, with which P(x) / (1 + Σ b_j |x|^j) is nearest to y; x, y, weight: (n), float64.

    For given b the best a is a linear least squares fit; over log b the rest of it is lowered by SciPy's least squares,
    from two starts. It is the form that is evaluated, on x as a share of its largest.
    """
    scale = float(x.abs().max().clamp_min(1e-6))
    u, root = (x / scale).numpy(), weight.sqrt().numpy()
    wanted = root * y.numpy()
    above = np.stack([u**i for i in range(NUMERATOR)], axis=1) * root[:, None]
    below = np.stack([np.abs(u) ** j for j in range(1, DENOMINATOR + 1)], axis=1)

    def fitted(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best a, and what it leaves."""
        columns = above / (1 + below @ np.exp(logs))[:, None]
        a = np.linalg.lstsq(columns, wanted)[0]
        return a, columns @ a - wanted

    published = np.abs(np.array(COEFFICIENTS["swish"][1])) * scale ** np.arange(1, DENOMINATOR + 1)
    starts = (np.log(published.clip(2e-9)).clip(-20, 20), np.zeros(DENOMINATOR))
    bounds, tight = (-20.5, 20.5), dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
    tried = [least_squares(lambda logs: fitted(logs)[1], start, bounds=bounds, **tight) for start in starts]
    logs = min(tried, key=lambda one: one.cost).x
    powers = scale ** -torch.arange(NUMERATOR, dtype=x.dtype)
    a, b = torch.from_numpy(fitted(logs)[0]), torch.from_numpy(np.exp(logs))
    return a * powers, b * powers[1 : DENOMINATOR + 1]


@torch.no_grad()
def _check_function(mlp: MLP, number: int) -> None:
    """TransectError unless the function makes of each neuron what it would make of it alone."""
    function: Any = mlp.activation
    x = torch.linspace(-INTERVAL, INTERVAL, 8).to(mlp.up.weight)
    if not mlp.can_narrow or not torch.allclose(function(x), function(x[:, None])[:, 0], atol=1e-3, rtol=1e-3):
        raise TransectError(
            f"kat: the function of the MLP of block {number}, {type(function).__name__}, is not the same for each "
            "neuron by itself, and no function of one number can follow it: convert a model whose function is"
        )


def _check(anatomy: Anatomy, groups: int, layers: str) -> None:
    chosen = block_numbers(layers, anatomy.blocks)
    check_mlps(anatomy, chosen)
    for number in chosen:
        _check_function(trained_mlp(anatomy.blocks[number]), number)
        for channels in trained_mlp(anatomy.blocks[number]).up.shape:
            if channels % groups:
                raise TransectError(f"kat: {groups} groups do not divide {channels} channels; choose other groups")


@conversion(
    "kat",
    paper="arXiv:2409.10594",
    group="rewrites and starts",
    exact="nothing; where the function of the MLP is followed exactly it is the model as it was",
    check=_check,
    stages=(Stage("kat", train="full", lr=1e-4),),
    causal=False,
)
@torch.no_grad()
def kat(
    anatomy: Anatomy, calibration: Calibration, *, groups: Annotated[int, Range(1, 2**20)] = 8, layers: str = ""
) -> None:
    """MLPs keep their matrices; their function becomes a trained rational one, and one more stands before them.

    That one begins as the identity, and the other as a fit of the MLP's own function to the values that it gets on
    the data (between the extremes, too, with a tenth of the weight), without data on [-3, 3] as in the paper. How near
    it is, is said: the error over what the function gives there, both root mean square, of the worst block. Gated MLPs
    stay gated, which is ours. All blocks are then trained.

    groups: of neighbouring channels that share a denominator; it divides the widths of stream and MLP.
    layers: only these blocks, such as 0-5,7; default all.
    """
    chosen = block_numbers(layers, anatomy.blocks)
    functions: dict[int, Any] = {number: trained_mlp(anatomy.blocks[number]).activation for number in chosen}
    seen = {} if calibration.data is None else inputs_of_modules(anatomy, functions, calibration.data)
    worst = 0.0
    for number in chosen:
        x, weight = _points(seen.get(number))
        y = functions[number](x.to(anatomy.model.device)).to(x)
        a, b = fit_rational(x, y, weight)
        mlp = trained_mlp(anatomy.blocks[number])
        matrices = {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
        settings = {
            "groups": groups, "gated": mlp.gate is not None,
            "bias": any(one is not None and one.bias is not None for one in matrices.values()),
        }  # fmt: skip
        trained = {role: dense(one.weight, one.bias) for role, one in matrices.items() if one is not None}
        insert(anatomy.model, "mlp", "kat", layers=[number], settings=settings, seed=calibration.seed)
        part: Any = anatomy.blocks[number].part("mlp")
        for role, one in trained.items():
            fill(getattr(part, f"{role}_proj"), one)
        part.between.numerator.copy_(a)
        part.between.denominator.copy_(b.expand_as(part.between.denominator))
        worst = max(worst, _error(part.between, x, y, weight, groups))
    calibration.told["error of the fitted function over its size, worst block"] = worst


def _points(seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the function is fitted, and how much each point weighs."""
    if seen is None:
        x = torch.linspace(-INTERVAL, INTERVAL, POINTS, dtype=torch.float64)
        return x, torch.ones_like(x)
    ordered = seen.double().flatten().cpu().sort().values
    often = ordered[torch.linspace(0, len(ordered) - 1, POINTS).long()]
    between = torch.linspace(float(ordered[0]), float(ordered[-1]), POINTS, dtype=torch.float64)
    return torch.cat([often, between]), torch.cat([torch.ones(POINTS), torch.full((POINTS,), TAIL)]).double()


def _error(function: Rational, x: Tensor, y: Tensor, weight: Tensor, groups: int) -> float:
    """How far the function, as it is stored, is from y, over the size of y."""
    given = x.to(function.numerator)[:, None].expand(-1, groups)
    off = function(given)[:, 0].to(y) - y
    return float((weight * off.square()).sum() / (weight * y.square()).sum()) ** 0.5
