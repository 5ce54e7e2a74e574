"""In-context linear regression (Garg et al., NeurIPS 2022, arXiv:2208.01066): every sequence has a linear map of its
own, and examples of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ..parameters import Range
from .fitting import fitted
from .registry import Drawn, task


def representation(x: Tensor, features: int) -> Tensor:
    """Φ(x) (... x features), a leaky ReLU network of two layers that is the same for all examples; x itself for 0.

    Its weights are drawn once from a fixed seed, and scaled so that over x ~ N(0, I) each feature has mean square 1 on
    average (Gao et al., 2024, arXiv:2402.13572, have such a task; sizes and scale are ours).
    """
    if not features:
        return x
    draw = torch.Generator().manual_seed(0)
    width = x.shape[-1]
    first, second = (
        torch.randn(rows, columns, generator=draw) / columns**0.5
        for rows, columns in ((features, width), (features, features))
    )  # features x width, features x features

    def made(x: Tensor) -> Tensor:
        hidden = functional.leaky_relu(x @ first.to(x).T, 0.2)
        return functional.leaky_relu(hidden @ second.to(x).T, 0.2)

    size = made(torch.randn(4096, width, generator=draw)).square().mean().sqrt()
    return made(x) / size.to(x)


def _baselines(drawn: Drawn, *, dimensions: int, points: int, noise: float, features: int = 0) -> Mapping[str, Tensor]:
    """The squared error of each at every example (count x 2 points), each from the examples before it."""
    x, y = representation(drawn.inputs[:, ::2].double(), features), drawn.inputs[:, 1::2, :1].double()
    # w has variance 1/n in each direction, so that this penalty is the mean of w given the examples
    said = fitted(x, y, x.shape[-1] * noise**2)
    return {name: (guess - y)[..., 0].square().float().repeat_interleave(2, dim=1) for name, guess in said.items()}


@task("icl-regression", paper="arXiv:2208.01066", over="example in the prompt", baselines=_baselines)
def icl_regression(
    count: int, generator: torch.Generator, *, dimensions: Annotated[int, Range(1, 512)] = 8,
    points: Annotated[int, Range(2, 4096)] = 24, noise: Annotated[float, Range(0, 100)] = 0.25,
    features: Annotated[int, Range(0, 512)] = 0,
) -> Drawn:  # fmt: skip
    """Inputs with what a linear map makes of them, drawn anew for every sequence: the next number is asked.

    x_i ~ N(0, I), y_i = w · x_i + noise, w ~ N(0, I / n). x_1, y_1, x_2, y_2, ... are vectors, y_i = (y_i, 0, ..., 0),
    which a linear map leads into the model; its answer is one number, and the loss the squared error, in units of the
    variance of w · x (as the paper has it: divided by n where w ~ N(0, I)). Least squares, ridge (the best there is,
    with the penalty that the noise asks for), averaging and the answer 0 stand beside the models.

    dimensions: of an input, n. points: examples in a sequence.
    noise: standard deviation of what is added to a label; 0 is the paper's plain form, in which ridge is least squares.
    features: y_i is linear in so many features of x_i instead, a fixed network's that is the same for all sequences,
        and the baselines know it; 0 for x_i itself.
    """
    x = torch.randn(count, points, dimensions, generator=generator)
    seen = representation(x, features)
    w = torch.randn(count, seen.shape[-1], 1, generator=generator) / seen.shape[-1] ** 0.5
    y = (seen @ w)[..., 0] + noise * torch.randn(count, points, generator=generator)
    inputs = torch.stack([x, functional.pad(y[:, :, None], (0, dimensions - 1))], dim=2).flatten(1, 2)
    answers = torch.full((count, 2 * points), torch.nan)
    answers[:, 1::2] = y
    over = torch.arange(1, points + 1).repeat_interleave(2).expand(count, 2 * points)
    return Drawn(inputs, answers, 1, over)
