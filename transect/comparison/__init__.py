"""Comparisons: every method at every budget on one model, resumable, over processes or a cluster."""

from .beside import beside_of
from .compare import check_plan, compare_anatomy
from .estimate import Estimate, estimate
from .plan import KIND, Plan, Row
from .streamed import compare_streamed

__all__ = [
    "KIND",
    "Estimate",
    "Plan",
    "Row",
    "beside_of",
    "check_plan",
    "compare_anatomy",
    "compare_streamed",
    "estimate",
]
