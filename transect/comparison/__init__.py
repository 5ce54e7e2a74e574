"""Comparisons: every method at every budget on one model, resumable, over processes or a cluster."""

from .compare import compare_anatomy
from .engines import Engine
from .plan import KIND, Plan, Row
from .streamed import compare_streamed

__all__ = ["KIND", "Engine", "Plan", "Row", "compare_anatomy", "compare_streamed"]
