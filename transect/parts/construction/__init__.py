"""Layers whose numbers are not trained but written down: what an architecture can do, as opposed to what it learns."""

from .uat_single_layer import (
    Lookup,
    OneLayer,
    approximation_report,
    error_curve,
    interpolator,
    one_layer_approximator,
)

__all__ = ["Lookup", "OneLayer", "approximation_report", "error_curve", "interpolator", "one_layer_approximator"]
