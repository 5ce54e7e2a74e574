"""LQER (Zhang et al., ICML 2024, arXiv:2402.02446)."""

from typing import Annotated

from torch import Tensor

from ...operators.corrected import Corrected
from ...statistics import FeatureNorm
from ..correction import corrected, corrected_size
from ..integers import to_nearest
from ..registry import Range, replacement


@replacement("lqer", paper="arXiv:2402.02446", size=corrected_size, even=True, needs=[FeatureNorm(power=1)])
def lqer(
    weight: Tensor,
    magnitude: Tensor,
    *,
    bits: int,
    rank: int,
    group: Annotated[int, Range(1, 65536)] = 64,
    symmetric: bool = False,
) -> Corrected:
    """Round to a few bits, and store the error's largest components, scaled by the features' magnitudes, beside them.

    E = W - Q, and L R are the leading components of E diag(s) times diag(s)⁻¹, with s_j = E|x_j| (the paper's L²QER).
    The authors take the largest mean of a sequence, where this is the mean over all; their Q has a format of its own,
    and their L and R have 8 bits. Here Q is `rtn` and L and R have the model's dtype.

    bits, rank: the most bits that the budget pays for beside a rank of 1, and the rank that the rest does.

    group: consecutive weights of a row that share a scale and a zero point.
    symmetric: no zero point: as many steps below zero as above, but one.
    """
    integers = to_nearest(weight, bits, group, symmetric)
    scale = magnitude.clamp_min(1e-6 * magnitude.mean())  # a feature that is never on must not be divided by zero
    return corrected(weight, integers, rank, scale.square())
