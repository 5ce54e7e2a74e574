"""The phase of a training recipe, on a map of load and temperature: the measurements, the runner, and the study."""

from . import model_zoo_phases  # noqa: F401 - importing it registers it
from .connectivity import (
    Joined,
    bezier,
    bezier_connectivity,
    check_alike,
    estimate_norms,
    losses_along,
    mode_connectivity,
    straight,
)
from .hessian import Estimate, hessian_trace, hessian_vector_product, top_eigenvalue
from .losses import Loss, mean_loss
from .phases import Cell, Placed, phase_of
from .similarity import Outputs, linear_cka, output_similarity
from .zoo import PhaseMap, Recipe, measured, phase_map

__all__ = [
    "Cell", "Estimate", "Joined", "Loss", "Outputs", "PhaseMap", "Placed", "Recipe", "bezier", "bezier_connectivity",
    "check_alike", "estimate_norms", "hessian_trace", "hessian_vector_product", "linear_cka", "losses_along",
    "mean_loss", "measured", "mode_connectivity", "output_similarity", "phase_map", "phase_of", "straight",
    "top_eigenvalue",
]  # fmt: skip
