"""The phase of a training recipe, from four measurements (Yang et al. 2021, arXiv:2107.11228; the zoo's table)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....errors import TransectError

HIGH, NEAR = 0.10, 0.05  # shares of the initial loss
MEANING = {
    "I": "under-fitted and under-sized: the loss is high, and a barrier stands between seeds",
    "II": "under-fitted: the loss is high, and seeds are connected",
    "III": "under-sized: the loss is small, and a barrier stands between seeds",
    "IV": "connected at a small loss; without a threshold of similarity, IV-A or IV-B",
    "IV-A": "over-fitted: small loss, connected, and seeds answer differently",
    "IV-B": "generalising: small loss, connected, and seeds answer alike",
    "diverged": "the loss is not finite any more",
}


@dataclass(frozen=True)
class Cell:
    """What was measured of models of one recipe, as means over seeds and pairs of seeds.

    initial_loss, training_loss: in evaluation mode, before and after training. connectivity: mc of the loss along the
    trained curve, same unit. similarity: linear CKA of outputs. sharpness: largest Hessian eigenvalue.
    """

    initial_loss: float
    training_loss: float
    connectivity: float
    similarity: float
    sharpness: float = math.nan


@dataclass(frozen=True)
class Placed:
    """A phase with what it was told by. meaning: in words. limits: what the numbers of the cell were held against."""

    phase: str
    cell: Cell
    limits: dict[str, float]

    @property
    def meaning(self) -> str:
        """The phase in words."""
        return MEANING[self.phase]

    def __str__(self) -> str:
        cell, limits = self.cell, self.limits
        return (
            f"{self.phase}, {self.meaning} (training loss {cell.training_loss:.4g}, high above {limits['loss']:.4g}; "
            f"mc {cell.connectivity:.4g}, near 0 within {limits['connectivity']:.4g}; CKA {cell.similarity:.4g}, large "
            f"above {limits['similarity']:.4g}; sharpness {cell.sharpness:.4g})"
        )


def phase_of(cell: Cell, similar: float = math.nan, *, high: float = HIGH, near: float = NEAR) -> Placed:
    """The phase of one cell of the map, with the numbers that say so.

    The papers read phases off maps by eye; the thresholds are ours. The training loss is high above `high` times the
    initial loss; a barrier is an mc below -`near` times the initial loss; the similarity is large above `similar`, the
    median of the map (NaN without a map: then IV-A and IV-B are not told apart). The sharpness goes with the loss in
    the papers' table and decides nothing here. A positive mc at a small loss, which the table leaves out, is connected.
    Raises TransectError for an initial loss that is not above 0.
    """
    if not cell.initial_loss > 0 or math.isinf(cell.initial_loss):
        raise TransectError(
            f"the thresholds are shares of the initial loss, which should be above 0, not {cell.initial_loss:g}"
        )
    limits = {"loss": high * cell.initial_loss, "connectivity": near * cell.initial_loss, "similarity": similar}
    if not (math.isfinite(cell.training_loss) and math.isfinite(cell.connectivity)):
        return Placed("diverged", cell, limits)
    barrier = cell.connectivity < -limits["connectivity"]
    if cell.training_loss > limits["loss"]:
        phase = "I" if barrier else "II"
    elif barrier:
        phase = "III"
    elif math.isnan(similar) or math.isnan(cell.similarity):
        phase = "IV"
    else:
        phase = "IV-B" if cell.similarity > similar else "IV-A"
    return Placed(phase, cell, limits)
