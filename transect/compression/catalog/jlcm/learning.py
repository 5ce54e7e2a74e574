"""Learning codes, scales and assignments together, so that a layer's outputs change little (part 2 of the paper)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .assignment import Proximal, Soft, Surrogate
from .coding import Coding

_CODE_RATE = 1e-3  # of Adam, relative to the largest code or scale
_MOVE_RATE = 3e-3  # relative to what would make up for the whole error of the column's own input


def learn(weight: Tensor, covariance: Tensor, coding: Coding, steps: int, surrogate: Surrogate = "proximal") -> Coding:
    """Lower tr((W - Ŵ) C (W - Ŵ)ᵀ), which is E||(W - Ŵ) x||², from a coding of W; the best one of the way.

    weight: W (d_out x d_in), covariance: C = E[x xᵀ] (d_in x d_in), both of sizes near 1.

    Codes and scales follow Adam. Weights follow the gradient (W - Ŵ) C, each column's over C_jj, the curvature along
    it, in gaps between codes. Many weights move at once and so overshoot together; the rates fall to 0 along a cosine,
    which settles them. How the paper sets them is not known to us.
    """
    curvature = covariance.diagonal().clamp_min(1e-12)
    assigned = (Proximal if surrogate == "proximal" else Soft)(weight, coding)
    codes, scale = coding.codes, coding.scale
    of_codes = _Adam(codes)
    of_scale = None if scale is None else _Adam(scale)
    best, least = coding, math.inf
    for number in range(steps + 1):
        now = Coding(codes, scale, coding.labels, assigned.indices)
        error = now.to_dense() - weight
        slope = error @ covariance  # half the gradient of Ŵ
        loss = float((error * slope).sum())
        if loss < least:
            best, least = now, loss
        share = (1 + math.cos(math.pi * number / steps)) / 2 if steps else 0.0
        of_table = gradients(now, slope)
        gaps = ((now.table[:, -1:] - now.table[:, :1]) / (codes.shape[1] - 1)).clamp_min(1e-12)
        assigned.move(slope / curvature / gaps[coding.labels] * (-_MOVE_RATE * share))
        codes = (codes + of_codes.step(of_table[0], share)).sort(1).values
        if of_scale is not None and scale is not None:
            scale = (scale + of_scale.step(of_table[1], share)).abs()  # positive, as codes ascend
    return best


def gradients(coding: Coding, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Of the codes (as they are) and the scales (G x 1), from that of Ŵ (d_out x d_in), the assignment fixed.

    dL/dc_k is the sum of a_g dL/dŴ_ij over the weights that have the code, dL/da_g that of c_k dL/dŴ_ij.
    """
    codes, scale = coding.codes, coding.scale
    by_row = gradient.new_zeros(len(gradient), codes.shape[1]).scatter_add_(1, coding.indices, gradient)
    of_table = torch.zeros_like(coding.table).index_add_(0, coding.labels, by_row)
    of_scale = (of_table * codes).sum(1, keepdim=True)
    return (of_table if scale is None else (scale * of_table).sum(0, keepdim=True)), of_scale


class _Adam:
    """Adam for a few numbers, of steps relative to the largest of them."""

    def __init__(self, numbers: Tensor) -> None:
        self._size = _CODE_RATE * float(numbers.abs().max())
        self._first, self._second, self._steps = torch.zeros_like(numbers), torch.zeros_like(numbers), 0

    def step(self, gradient: Tensor, share: float) -> Tensor:
        """What to add to the numbers."""
        self._steps += 1
        self._first.lerp_(gradient, 0.1)
        self._second.lerp_(gradient.square(), 0.001)
        root = (self._second / (1 - 0.999**self._steps)).sqrt().clamp_min(1e-30)
        return self._first / (1 - 0.9**self._steps) / root * (-self._size * share)
