"""NoWag-P to 2:4 (Liu et al., 2025, arXiv:2504.14569)."""

from torch import Tensor

from ...operators.semi_structured import SemiStructured
from ...statistics import FeatureNorm
from ..registry import replacement
from ..two_four import ENGINES, normalized, two_four, two_four_size, usable


@replacement("nowag-p", paper="arXiv:2504.14569", size=two_four_size, note=ENGINES, needs=[FeatureNorm(power=2)])
def nowag_p(weight: Tensor, rms: Tensor) -> SemiStructured:
    """Keep the two of every four weights with the largest W̄² E x²; W̄ has its columns, then its rows normalised.

    It is where ARMOR starts. The weights that are kept stay as they are. A feature that is never on counts like the
    mean of the others, as in ARMOR's code.
    """
    return two_four(weight, normalized(weight)[0].square() * usable(rms.square()))
