"""Few bits without oscillation: StatsQ, confidence-guided annealing, merged queries and keys (arXiv:2302.02210)."""

from .ofq import FewBits, ofq
from .oscillation import MOMENTUM, THRESHOLD, Oscillation
from .quantizers import LEAST_STEP, from_boundary, lsq, lsq_ends, lsq_start, statistic, stats_positions, statsq
from .query_key import merged, quantized_merged, scores

__all__ = [
    "LEAST_STEP", "MOMENTUM", "THRESHOLD", "FewBits", "Oscillation", "from_boundary", "lsq", "lsq_ends", "lsq_start",
    "merged", "ofq", "quantized_merged", "scores", "statistic", "stats_positions", "statsq",
]  # fmt: skip
