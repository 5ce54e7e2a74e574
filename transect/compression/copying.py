"""A copy of a model to compress, beside which the dense one lives on."""

from __future__ import annotations

import copy

from ..anatomy import Anatomy


def working_copy(anatomy: Anatomy, weights: bool = True) -> Anatomy:
    """The same model with blocks of its own; what lies outside the blocks is not changed by compression, and is shared.

    So it costs the memory of the blocks, not that of the embedding and the head. weights: False where blocks have none.
    """
    model = anatomy.model
    inside = {id(parameter) for parameter in anatomy.block_list.parameters()}
    shared = {id(p): p for p in model.parameters() if id(p) not in inside}
    return Anatomy(copy.deepcopy(model, shared), anatomy.architecture, weights=weights)
