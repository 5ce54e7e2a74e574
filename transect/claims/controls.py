"""Random choices as controls: their mean, compared with a chosen model sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .context import Measured
from .ordering import Comparison


def mean_of(measured: Sequence[Measured]) -> Measured:
    """The mean loss of several models on the same sequences."""
    nats = torch.stack([one.nats for one in measured]).mean(0)
    return Measured(nats, measured[0].predictions, sum(one.kept for one in measured) / len(measured))


def comparison(keep: float, better: tuple[str, Measured], worse: tuple[str, Measured]) -> Comparison:
    """Two measured models, each with its name, as `ordering.judge` takes them."""
    (name, first), (other, second) = better, worse
    return Comparison(
        keep, name, other, first.kept, second.kept, first.loss, second.loss, *first.minus(second)
    )  # fmt: skip
