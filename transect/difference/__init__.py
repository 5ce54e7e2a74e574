"""What differs between two checkpoints of one model: in the weights, on a text, in what they know, and in the loss.

Each comparison is a probe of a pair, and goes through the frame of probes: the same results, files and report.
"""

from . import catalog  # noqa: F401 - importing one registers it
from .pair import Pair, pair_of
from .registry import comparison, comparisons

__all__ = ["Pair", "comparison", "comparisons", "pair_of"]
