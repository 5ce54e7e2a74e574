"""What both parts of Dense2MoE are trained by: the predictions and the stream of the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....forward import Batch, real_positions, watch
from ....training import distance_from


def follow(model: Any, teacher: Any, batch: Batch, ends: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Distance of the predictions, plus Σ_l ||f_T - f_S||² / mean ||f_T||² of the stream behind each block.

    The paper's outputs are vectors, whose squared distance it takes; ours are predictions, of which it is the KL
    divergence. The weight of a block evens out how long its vectors are (ours).
    ends: the blocks behind which streams are compared, by their numbers; default all.
    """
    real = real_positions(batch)
    with (
        watch(Anatomy(teacher), ["residual"]) as theirs,
        watch(Anatomy(model), ["residual"], keep_graph=True) as ours,
    ):
        distance, count = distance_from(teacher, model, batch, 1.0)
    apart = torch.zeros((), device=distance.device)
    for block in range(len(theirs.residual) - 1) if ends is None else ends:
        layer = block + 1
        target, found = theirs.residual[layer].float(), ours.residual[layer].float()
        if real is not None:
            target, found = (one[real.to(one.device)] for one in (target, found))
        apart = apart + (target - found).square().sum() / target.square().sum().clamp_min(1e-30)
    return distance + count * apart, count
