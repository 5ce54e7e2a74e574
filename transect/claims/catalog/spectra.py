"""Claims about the spectra of weight matrices (Martin and Mahoney, arXiv:1810.01075; FARMS, arXiv:2506.06280)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...spectra import hill_median, pooled_eigenvalues, singular_values
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

_WINDOWS = 4
_LARGEST_WINDOW = 2000


@claim(
    "spectra/heavier-than-random",
    method="spectra",
    paper="arXiv:1810.01075",
    statement="The spectra of trained weight matrices have heavier tails than those of random ones of the same shape.",
)
def heavier_than_random(context: Context) -> Result:
    """Hill's exponent over windows of one size, of every matrix and of a Gaussian one of its shape."""
    rows = _window(context.matrices)
    trained, random = [], []
    for number, matrix in enumerate(context.matrices):
        weight = matrix.weight.double()
        trained.append(hill_median(pooled_eigenvalues(weight, rows, windows=_WINDOWS)))
        random.append(hill_median(pooled_eigenvalues(_gaussian(matrix, number), rows, windows=_WINDOWS)))
    lower = sum(a < b for a, b in zip(trained, random, strict=True))
    numbers = [
        {"matrix": matrix.name, "exponent": round(a, 4), "random": round(b, 4)}
        for matrix, a, b in zip(context.matrices, trained, random, strict=True)
    ]
    holds = lower > 0.9 * len(trained)
    return Result(
        Verdict.of(holds),
        f"{lower} of {len(trained)} matrices have a smaller tail exponent than a random one of their shape (windows of "
        f"{rows} x {rows}); mean {_mean(trained):.3f} against {_mean(random):.3f}. More than nine in ten are asked for",
        numbers,
    )


@claim(
    "spectra/no-shape-bias",
    method="spectra",
    paper="arXiv:2506.06280",
    statement="The tail exponent of a random matrix depends on its shape, and with windows of one shape it does not.",
)
def no_shape_bias(context: Context) -> Result:
    """Gaussian matrices of the shapes that the model has: the range of the exponents without and with windows."""
    shapes = list({tuple(sorted(matrix.shape)): matrix for matrix in context.matrices}.values())
    if len(shapes) == 1:
        raise NotApplicable("all matrices of this model have one shape")
    rows = _window(context.matrices)
    numbers, ranges = [], {}
    for kind in ("whole", "windows"):
        exponents = []
        for number, matrix in enumerate(shapes):
            weight = _gaussian(matrix, number)
            if kind == "whole":
                eigenvalues = singular_values(weight).square().flip(0)
            else:
                eigenvalues = pooled_eigenvalues(weight, rows, windows=_WINDOWS)
            exponents.append(hill_median(eigenvalues))
            numbers.append({"of": kind, "shape": " x ".join(map(str, matrix.shape)), "exponent": exponents[-1]})
        ranges[kind] = max(exponents) - min(exponents)
    holds = ranges["windows"] < 0.2 * ranges["whole"]
    return Result(
        Verdict.of(holds),
        f"Over {len(shapes)} shapes Hill's exponent of Gaussian matrices spans {ranges['whole']:.3f}, and with windows "
        f"of {rows} x {rows} {ranges['windows']:.3f}. Less than a fifth is asked for",
        numbers,
    )


def _window(matrices: list[Matrix]) -> int:
    return min(_LARGEST_WINDOW, *(min(matrix.shape) for matrix in matrices))


def _gaussian(matrix: Matrix, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*matrix.shape, generator=generator, dtype=torch.float64).to(matrix.weight.device)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
