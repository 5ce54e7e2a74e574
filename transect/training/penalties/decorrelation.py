"""Decorrelation from the first token, against attention sinks and massive activations that come up in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ...errors import TransectError
from ...forward.objective import IGNORED, real_positions
from ...parameters import Range
from .registry import Seen, penalty


@penalty("decorrelation", paper="arXiv:2510.22603")
def decorrelation(seen: Seen, *, weight: Annotated[float, Range(0)] = 1e4) -> Tensor:
    """The mean squared cosine between the first token's state and every other's, in the layers between.

    The gradient reaches both states. Answers (positions that have labels where others have none) and padding do not
    count. A model of fewer than two blocks has no layer in between: TransectError.

    weight: of the penalty. The paper's 10,000 goes with cosines near 0; of a small model the squared cosines are about
        1 / width, and a tenth of the loss over the penalty is a better start (ours).
    """
    between = seen.states[1:-1]
    if not between:
        raise TransectError("decorrelation needs a model of two blocks or more: there is no layer in between")
    real = real_positions(seen.batch)
    counted = torch.ones(between[0].shape[:2], dtype=torch.bool) if real is None else real
    labels = seen.batch.get("labels")
    inputs = counted if labels is None or labels.dim() != 2 else counted & (labels == IGNORED)
    if labels is not None and not bool(inputs.any()):  # every token is to be predicted: all are inputs
        inputs = counted
    device = between[0].device
    return weight * squared_cosines(between, counted.to(device).int().argmax(1), inputs.to(device))


def squared_cosines(states: Sequence[Tensor], anchors: Tensor, counted: Tensor) -> Tensor:
    """The mean of cos(h_a, h_t)² over layers, sequences and the counted t other than a; 0 where none is counted.

    states: of each layer (B, T, d). anchors: a of each sequence (B). counted: (B, T), true at tokens that count.
    In [0, 1], and the same for any lengths of the states; computed in float32 or wider.
    """
    rows = torch.arange(len(anchors), device=anchors.device)
    others = counted.clone()
    others[rows, anchors] = False
    if not bool(others.any()):
        return states[0].new_zeros(())
    means = []
    for state in states:
        wide = state if state.dtype == torch.float64 else state.float()
        unit = torch.nn.functional.normalize(wide, dim=-1, eps=1e-12)
        cosines = (unit * unit[rows, anchors][:, None]).sum(-1)  # (B, T)
        means.append(cosines[others].square().mean())
    return torch.stack(means).mean()
