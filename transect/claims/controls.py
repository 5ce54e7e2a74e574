"""Random choices as controls: their mean, to be compared with a chosen model sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .context import Measured


def mean_of(measured: Sequence[Measured]) -> Measured:
    """The mean loss of several models on the same sequences."""
    nats = torch.stack([one.nats for one in measured]).mean(0)
    return Measured(nats, measured[0].predictions, sum(one.kept for one in measured) / len(measured))
