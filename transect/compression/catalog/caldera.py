"""CALDERA (Saha et al., NeurIPS 2024, arXiv:2405.18886)."""

from typing import Annotated

from torch import Tensor

from ...operators.corrected import Corrected
from ...statistics import InputCovariance
from ..correction import corrected, corrected_size
from ..in_order import rounded_in_order
from ..registry import Range, replacement
from ..weighted_svd import shrink


@replacement("caldera", paper="arXiv:2405.18886", size=corrected_size, even=True, needs=[InputCovariance()])
def caldera(
    weight: Tensor,
    covariance: Tensor,
    *,
    bits: int,
    rank: int,
    rounds: Annotated[int, Range(1, 1000)] = 5,
    group: Annotated[int, Range(1, 65536)] = 64,
    symmetric: bool = False,
    act_order: bool = False,
    damping: Annotated[float, Range(1e-6, 1)] = 0.01,
    shrinkage: Annotated[float, Range(0, 1)] = 1e-6,
) -> Corrected:
    """Round what a low-rank part leaves, and take the low-rank part of what rounding leaves, in turn.

    Q is W - L R by GPTQ, L R is the best correction of W - Q (see `eora`, which is the first round), and so on
    (Algorithm 1). The round with the least E||(W - Q - L R) x||² is kept. The authors round to lattices after a
    Hadamard transform, and L and R too; here Q is in groups, and L and R have the model's dtype (their 16 bits).

    bits, rank: the most bits that the budget pays for beside a rank of 1, and the rank that the rest does; ours.

    rounds: how often both are found; each costs as much as `eora`.
    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    act_order: see `gptq`.
    damping: see `gptq`.
    shrinkage: see `eora`.
    """
    moments = shrink(covariance, shrinkage)
    best, least, left_over = None, 0.0, weight
    for _ in range(rounds):
        integers = rounded_in_order(left_over, covariance, bits, group, symmetric, act_order, damping)
        made = corrected(weight, integers, rank, moments)
        left_over = weight - made.correction.to_dense().detach()
        error = weight - made.to_dense().detach()
        loss = float(((error @ moments) * error).sum())
        if best is None or loss < least:
            best, least = made, loss
    assert best is not None
    return best
