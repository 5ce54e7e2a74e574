"""The mean of the models' weights."""

from __future__ import annotations

from torch import Tensor

from ..registry import Given, merging, tensors_of
from ..shares import mean_of, shares_of


def _check(given: Given, *, weights: str) -> None:
    shares_of(weights, len(given.models), "average")


@merging("average", paper="arXiv:2203.05482", check=_check)
def average(given: Given, *, weights: str = "") -> dict[str, Tensor]:
    """The mean of the weights, tensor by tensor, of models that were trained from the same start.

    Σ_k w_k θ_k with Σ w = 1 (a uniform soup, Wortsman et al. 2022). Models from different starts have their neurons in
    different orders, and their mean is worth little: see `weight-matching`.

    weights: a number for each model, such as 0.7,0.3; they add up to 1. Default: equal.
    """
    return mean_of([tensors_of(one.model) for one in given.models], shares_of(weights, len(given.models), "average"))
