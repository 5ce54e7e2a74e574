"""Magnitude pruning to 2:4 (the oldest baseline; pattern of Mishra et al., arXiv:2104.08378)."""

from torch import Tensor

from ...operators.semi_structured import SemiStructured
from ..registry import replacement
from ..two_four import ENGINES, two_four, two_four_size


@replacement("magnitude", paper="arXiv:2104.08378", size=two_four_size, note=ENGINES)
def magnitude(weight: Tensor) -> SemiStructured:
    """Keep the two largest weights of every four, by size; no data."""
    return two_four(weight, weight.abs())
