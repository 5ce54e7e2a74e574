"""Networks that are read off examples of all their steps (Gao et al., 2024, arXiv:2402.13572; Li et al., NeurIPS 2023,
arXiv:2305.18869)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ..parameters import Range
from .fitting import fitted
from .registry import Drawn, task

_SLOPE = 0.2
_GAIN = (2 / (1 + _SLOPE**2)) ** 0.5  # leaves the mean square of z ~ N(0, 1) 1


def _step(z: Tensor) -> Tensor:
    return _GAIN * functional.leaky_relu(z, _SLOPE)


def _before_step(s: Tensor) -> Tensor:
    return functional.leaky_relu(s / _GAIN, 1 / _SLOPE)


def _baselines(drawn: Drawn, *, dimensions: int, points: int, steps: int, hidden: int) -> Mapping[str, Tensor]:
    """The squared error of each at every number (count x T), each from the chains before it."""
    chains = drawn.inputs.double().unflatten(1, (points, 1 + steps * hidden))
    state = chains[:, :, 0]  # count x points x d
    found: dict[str, list[Tensor]] = {"nothing": [], "least squares": []}
    for numbers in chains[:, :, 1:, 0].split(hidden, dim=-1):  # of each step: count x points x hidden
        said = _step(fitted(state, _before_step(numbers))["least squares"])
        found["nothing"].append(numbers.square())
        found["least squares"].append((said - numbers).square())
        state = numbers
    padded = {name: functional.pad(torch.cat(errors, dim=-1), (1, 0)) for name, errors in found.items()}
    return {name: errors.flatten(1).float() for name, errors in padded.items()}


@task("icl-chain", paper="arXiv:2402.13572", over="chain in the prompt", baselines=_baselines)
def icl_chain(
    count: int, generator: torch.Generator, *, dimensions: Annotated[int, Range(1, 512)] = 4,
    points: Annotated[int, Range(2, 4096)] = 12, steps: Annotated[int, Range(1, 64)] = 2,
    hidden: Annotated[int, Range(1, 512)] = 4,
) -> Drawn:  # fmt: skip
    """Inputs with all that a network makes of them, step by step; it is drawn anew for every sequence, and the next
    number is asked.

    s_0 = x ~ N(0, I), s_l = φ(W_l s_(l-1)), φ a leaky ReLU that keeps the mean square, W_l ~ N(0, 1 / width). A chain
    is the vector x, and the numbers of s_1, ..., s_L one after another, each as (number, 0, ..., 0): all of them are
    asked. Least squares of each step on the chains before, behind the inverse of φ, has an error of 0 once there are
    more chains than numbers in a state; it and the answer 0 stand beside the models. Sizes are ours.

    dimensions: of an input. points: chains in a sequence. steps: of the network, L. hidden: numbers in a state.
    """
    state = torch.randn(count, points, dimensions, generator=generator)
    tokens = [state[:, :, None]]  # count x points x 1 x d
    for _ in range(steps):
        width = state.shape[-1]
        weight = torch.randn(count, width, hidden, generator=generator) / width**0.5
        state = _step(state @ weight)
        tokens.append(functional.pad(state[..., None], (0, dimensions - 1)))
    inputs = torch.cat(tokens, dim=2).flatten(1, 2)  # count x T x d
    number = torch.arange(inputs.shape[1]) % (1 + steps * hidden)
    answers = inputs[:, :, 0].masked_fill(number == 0, torch.nan)
    over = (1 + torch.arange(inputs.shape[1]) // (1 + steps * hidden)).expand(answers.shape)
    return Drawn(inputs, answers, 1, over)
