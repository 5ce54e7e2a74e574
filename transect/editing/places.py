"""Which layers an edit changes, and their down-projections."""

from __future__ import annotations

from ..anatomy import Matrix
from ..anatomy.storage import is_dense
from ..data import Specimen
from ..errors import NotApplicable, TransectError


def usual_layer(specimen: Specimen) -> int:
    """Just below a third of the way up: 15 of 48, 7 of 24, 8 of 28.

    ROME's own choices are 17 of 48 (GPT-2 XL), 8 of 24 (GPT-2 medium) and 5 of 28 (GPT-J).
    """
    return max(0, specimen.layers // 3 - 1)


def down_of(specimen: Specimen, layer: int) -> Matrix:
    """The down-projection of a layer; an error where it is gone, or not stored as a matrix."""
    if not 0 <= layer < specimen.layers:
        raise TransectError(f"layer {layer} does not exist: the model has layers 0 to {specimen.layers - 1}")
    mlp = specimen.anatomy.blocks[layer].mlp
    if mlp is None:
        raise NotApplicable(
            f"the MLP of layer {layer} was dropped, or is a part: there is nothing to edit; choose another layer"
        )
    if not is_dense(mlp.down.module):
        kind = type(mlp.down.module).__name__
        raise NotApplicable(f"{mlp.down.name} is stored as {kind}, not as a matrix that could be written into")
    return mlp.down
