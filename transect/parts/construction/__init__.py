"""Layers whose numbers are not trained but written down: what an architecture can do, as opposed to what it learns."""

from .algoformer import AlgoFormer, GradientStep, gradient_descent
from .uat_single_layer import (
    Lookup,
    OneLayer,
    approximation_report,
    error_curve,
    interpolator,
    one_layer_approximator,
)

__all__ = [
    "AlgoFormer", "GradientStep", "Lookup", "OneLayer", "approximation_report", "error_curve", "gradient_descent",
    "interpolator", "one_layer_approximator",
]  # fmt: skip
