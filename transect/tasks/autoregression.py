"""Sequences that go on by a rule of their own (Gao et al., 2024, arXiv:2402.13572): linear in features of the last few
numbers, which are the same for all sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from ..errors import TransectError
from ..parameters import Range
from .fitting import fitted
from .registry import Drawn, task
from .regression import representation


def _features(windows: Tensor, features: int) -> Tensor:
    """Φ of the last numbers (... x order), which are divided by their root mean square before it."""
    size = windows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    return representation(windows / size, features)


def _baselines(drawn: Drawn, *, order: int, points: int, noise: float, features: int) -> Mapping[str, Tensor]:
    """The squared error of each at every number (count x points), each from those before it."""
    numbers = drawn.inputs[:, :, 0].double()
    windows = _features(numbers.unfold(1, order, 1)[:, :-1], features)  # of each number from the first that is asked
    wanted = numbers[:, order:]
    said = dict(fitted(windows, wanted[..., None], windows.shape[-1] * noise**2))
    del said["averaging"]  # means little for features that are not centred
    said["the number before"] = numbers[:, order - 1 : -1, None]
    errors = torch.full((len(said), *numbers.shape), torch.nan)
    errors[:, :, order:] = torch.stack([(guess[..., 0] - wanted).square().float() for guess in said.values()])
    return dict(zip(said, errors, strict=True))


@task("icl-autoregression", paper="arXiv:2402.13572", over="number that the rule has given", baselines=_baselines)
def icl_autoregression(
    count: int, generator: torch.Generator, *, order: Annotated[int, Range(1, 64)] = 3,
    points: Annotated[int, Range(3, 4096)] = 40, noise: Annotated[float, Range(0, 100)] = 0.1,
    features: Annotated[int, Range(0, 512)] = 8,
) -> Drawn:  # fmt: skip
    """Numbers, each made of the last ones by a rule that is drawn anew for every sequence: the next one is asked.

    x_t = a · Φ(w_t / |w_t|) + noise, w_t the last `order` numbers, |w| their root mean square, a ~ N(0, I / n); Φ is a
    fixed network of leaky ReLU (see `representation`), and the first `order` numbers are N(0, 1). Dividing by |w| is
    ours: without it sequences vanish or grow without bound. Numbers are vectors of one entry, which a linear map leads
    into the model. Least squares and ridge on the true features, the number before and the answer 0 stand beside.

    order: of the last numbers how many there are in the rule, q.
    points: numbers in a sequence, the first ones among them.
    noise: standard deviation of what is added to each number, and takes part in what follows.
    features: of Φ, n; 0 for the last numbers themselves.
    """
    if points < order + 2:
        raise TransectError(f"points={points} numbers should be at least order + 2 = {order + 2}")
    width = features or order
    rule = torch.randn(count, width, 1, generator=generator) / width**0.5
    numbers = torch.randn(count, points, generator=generator)
    added = noise * torch.randn(count, points, generator=generator)
    for at in range(order, points):
        seen = _features(numbers[:, at - order : at], features)  # count x n
        numbers[:, at] = (seen[:, None] @ rule)[:, 0, 0] + added[:, at]
    answers = numbers.clone()
    answers[:, :order] = torch.nan
    over = (torch.arange(points) - order + 1).clamp_min(0).expand(count, points)
    return Drawn(numbers[..., None], answers, 1, over)
