"""The phase of a training recipe, on a map of load and temperature: the measurements, the runner, and the study.

Checkpoints of one's own, of one recipe and several seeds, are placed by

    measures = Measures(own_loss, error, outputs, training, held_out)
    found = measured(models, measures)
    before = mean_loss(untrained, own_loss, training)
    print(phase_of(cell_of({**found, "initial_loss": torch.tensor(before)})))

with `own_loss` of `transect.training` for models of transformers, or any loss of any module (see `Loss`). A whole map
of a recipe of one's own is trained and measured by `phase_map`.
"""

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
from .zoo import Measures, PhaseMap, Recipe, cell_of, measured, phase_map

__all__ = [
    "Cell", "Estimate", "Joined", "Loss", "Measures", "Outputs", "PhaseMap", "Placed", "Recipe", "bezier",
    "bezier_connectivity", "cell_of", "check_alike", "estimate_norms", "hessian_trace", "hessian_vector_product",
    "linear_cka", "losses_along", "mean_loss", "measured", "mode_connectivity", "output_similarity", "phase_map",
    "phase_of", "straight", "top_eigenvalue",
]  # fmt: skip
