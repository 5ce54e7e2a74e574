"""EoRA (Liu et al., 2024, arXiv:2410.21271)."""

from typing import Annotated

from torch import Tensor

from ...operators.corrected import Corrected
from ...statistics import InputCovariance
from ..correction import corrected, corrected_size
from ..in_order import rounded_in_order
from ..registry import Range, replacement
from ..weighted_svd import shrink


@replacement("eora", paper="arXiv:2410.21271", size=corrected_size, even=True, needs=[InputCovariance()])
def eora(
    weight: Tensor,
    covariance: Tensor,
    *,
    bits: int,
    rank: int,
    group: Annotated[int, Range(1, 65536)] = 64,
    symmetric: bool = False,
    act_order: bool = False,
    damping: Annotated[float, Range(1e-6, 1)] = 0.01,
    shrinkage: Annotated[float, Range(0, 1)] = 1e-6,
) -> Corrected:
    """Round by GPTQ, and store those components of its error beside it that change the outputs most.

    With E = W - Q and C = E[x xᵀ] = V Λ Vᵀ, L R are the leading components of E V Λ^½ times Λ^-½ Vᵀ: of all
    corrections of that rank the one with the least E||(W - Q - L R) x||². (QERA, arXiv:2410.06040, is the same with
    Λ^½ in C's own axes.) L and R have the model's dtype.

    bits, rank: the most bits that the budget pays for beside a rank of 1, and the rank that the rest does; ours.

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    act_order: see `gptq`.
    damping: see `gptq`.
    shrinkage: for the correction C becomes (1 - s) C + s mean(diag C) I, so that directions never seen in calibration
        stay bounded. Ours; the authors raise negative eigenvalues alone.
    """
    integers = rounded_in_order(weight, covariance, bits, group, symmetric, act_order, damping)
    return corrected(weight, integers, rank, shrink(covariance, shrinkage))
