"""StatsQ, the paper's quantizer of weights, and LSQ, that of activations, which it also compares with on weights.

Both put a number at a position z on a line where the levels are whole numbers from -n to n - 1, n = 2^(bits - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAST = 1e-30  # in place of the scale of a row of zeros
LEAST_STEP = 1e-5  # the smallest step of LSQ, the authors'
_BELOW = 1 - 1e-6  # in place of 1, which would be rounded to a level too many


def statistic(weight: Tensor) -> Tensor:
    """s = 2 mean_j |W_ij| of each row (d_out x 1), without gradient: the only scale, and nothing learned."""
    return 2 * _wide(weight).abs().mean(1, keepdim=True).clamp_min(_LEAST)


def stats_positions(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """z = clamp(W / s, -1, 1) n - ½ (d_out x d_in), in at least 32 bits.

    At W / s = -1 it is -n - ½, a tie that torch's round, to even numbers, takes up to -n, as n is even.
    """
    return (_wide(weight) / scale).clamp(-1, _BELOW) * 2 ** (bits - 1) - 0.5


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def statsq(weight: Tensor, bits: int) -> Tensor:
    """s (round(z) + ½) / n: 2^bits levels in each row (d_out x d_in), as many above zero as below, and none at it."""
    scale = statistic(weight)
    return scale / 2 ** (bits - 1) * (stats_positions(weight, scale, bits).round() + 0.5)


def from_boundary(positions: Tensor, bits: int) -> Tensor:
    """How far each position is from the nearest boundary between two levels, in levels; at most 1, beyond the ends."""
    n = 2 ** (bits - 1)
    return (positions - positions.floor().clamp(-n, n - 2) - 0.5).abs()


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, step)
        ctx.ends = low, high
        size = step.clamp_min(LEAST_STEP)
        return size * (x / size).clamp(low, high).round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore
        (x, step), (low, high) = ctx.saved_tensors, ctx.ends
        v = x / step.clamp_min(LEAST_STEP)
        inside = (v >= low) & (v <= high)
        slope = torch.where(inside, v.round() - v, v.clamp(low, high))
        count = x.numel() / step.numel()
        by_step = (gradient * slope).sum_to_size(step.shape) / (high * count) ** 0.5
        return gradient * inside, by_step, None, None


def lsq(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """σ round(clamp(x / σ, low, high)), with a step σ > 0 that is learned (Esser et al., 2020, arXiv:1902.08153).

    step: as many as broadcast to x. The gradient of x is the identity where nothing is clamped, and 0 elsewhere. That
    of σ is Σ g (round(v) - v), v = x / σ, or Σ g low, Σ g high where it is clamped, over √(high count) with count
    the numbers that share the step. A step below 1e-5 counts as that, and still gets its gradient.
    """
    made: Any = _Lsq.apply(x, step, low, high)
    return made


def lsq_ends(bits: int, signed: bool = True) -> tuple[int, int]:
    """The lowest and the highest level, over σ."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq_start(mean: Tensor, bits: int, signed: bool = True) -> Tensor:
    """σ to start from, given the mean of |x|: 2 mean / √high, and twice that where no x is negative."""
    return (2 if signed else 4) * mean / lsq_ends(bits, signed)[1] ** 0.5
