"""FARMS: larger steps for layers whose weights look less trained (Hu et al., ICML 2025, arXiv:2506.06280)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from torch import Tensor

from ...errors import TransectError
from ...parameters import Range
from ...spectra import common_window, stretched, tail_exponent
from .registry import Factors, rates_of_layers


@rates_of_layers("farms", paper="arXiv:2506.06280")
def farms(
    *,
    smallest: Annotated[float, Range(0, 1)] = 0.5,
    largest: Annotated[float, Range(1, 100)] = 1.5,
    every: Annotated[int, Range(0, 2**31 - 1)] = 0,
    window: Annotated[int, Range(0, 100_000)] = 0,
    windows: Annotated[int, Range(1, 100)] = 4,
    estimator: Literal["hill-median", "peak"] = "hill-median",
) -> Factors:
    """Larger steps for layers whose weights have a light-tailed spectrum, which reads as less trained.

    TempBalance (Zhou et al., NeurIPS 2023) with the exponents of FARMS. With α_l the tail exponent of layer l's weight,
    its learning rate is multiplied by (α_l - min α) / (max α - min α) (largest - smallest) + smallest; by 1 where all
    exponents are the same, and where the weight is zero and has none. The exponents come from windows of one shape,
    as in the allocation of the same name, and are those of the weights as they are at the moment.

    smallest: the factor of the layer with the heaviest tail.
    largest: of the one with the lightest. The mean over the layers need not be 1.
    every: steps from one look at the weights to the next; 0 is once an epoch, as the authors have it.
    window: rows (and columns) of a window; 0 is the smallest side of all the layers, at most 2000.
    windows: windows along each side of a matrix. Costs windows² eigenvalue problems of every layer at each look; the
        authors take 10 or more where they look once (our choice).
    estimator: where the tail begins: at the median eigenvalue, as the authors train, or where a power law fits best
        near the density's peak (noisy).
    """

    def of(weights: Mapping[str, Tensor]) -> dict[str, float]:
        rows = window or common_window(weight.shape for weight in weights.values())
        alphas = {}
        for name, weight in weights.items():
            try:
                alphas[name] = tail_exponent(weight, rows, windows, estimator)
            except TransectError as error:
                raise TransectError(f"farms cannot choose a rate for {name}: {error}; train without it") from None
        known = {name: alpha for name, alpha in alphas.items() if not math.isnan(alpha)}
        return dict.fromkeys(weights, 1.0) | (stretched(known, smallest, largest) if known else {})

    return Factors(of, every)
