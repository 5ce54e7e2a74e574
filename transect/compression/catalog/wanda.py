"""Wanda to 2:4 (Sun et al., ICLR 2024, arXiv:2306.11695)."""

from torch import Tensor

from ...operators.semi_structured import SemiStructured
from ...statistics import FeatureNorm
from ..registry import replacement
from ..two_four import ENGINES, two_four, two_four_size


@replacement("wanda", paper="arXiv:2306.11695", size=two_four_size, note=ENGINES, needs=[FeatureNorm(power=2)])
def wanda(weight: Tensor, rms: Tensor) -> SemiStructured:
    """Keep the two of every four weights that move the layer's outputs most: |W_ij| times the feature's norm.

    Section 3 of the paper, with its groups of four consecutive weights of a row. The norm over the calibration data
    and its root mean square give the same order.
    """
    return two_four(weight, weight.abs() * rms)
