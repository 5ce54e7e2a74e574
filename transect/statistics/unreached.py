"""What stands for the statistics of an expert that no position of the data was sent to, or none with a gradient."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .gram import is_gram
from .kinds import Statistic, Sums


def of_the_others(key: str, statistic: Statistic, known: Mapping[tuple[str, str], Sums]) -> Tensor | None:
    """The statistic pooled over the other experts of the block; None where the expert has one, or none of them has.

    The positions that went to the others are what the layer sees. Their residual streams, and the gradients of what
    experts add to it, have the same coordinates for all, so these are taken as they are. Neurons of different experts
    have nothing to do with each other: of statistics in these coordinates only the mean over the neurons is taken,
    as if all were alike and uncorrelated. A method that weighs inputs by it then does as plain SVD does.
    key: as in `collect.key_of`. known: all sums by key and label.
    """
    parts = re.fullmatch(r"(.*\.mlp\.experts)\.\d+\.(\w+)", key)
    own = known[key, statistic.label]
    if parts is None or _says_something(own):
        return None
    total: Sums = {}
    for (other, label), sums in known.items():
        match = re.fullmatch(re.escape(parts[1]) + r"\.\d+\." + parts[2], other)
        alike = match and label == statistic.label and all(sums[name].shape == own[name].shape for name in own)
        if alike and _says_something(sums):
            total = {name: total[name] + tensor if total else tensor for name, tensor in sums.items()}
    return _evened(statistic.value(total), parts[2], is_gram(total)) if total else None


def _says_something(sums: Sums) -> bool:
    return float(sums["count"]) > 0 and any(bool(tensor.any()) for name, tensor in sums.items() if name != "count")


def _evened(value: Tensor, place: str, covariance: bool) -> Tensor:
    """The value with the same number for every neuron. place: `input`, `neurons`, or the role of a matrix."""
    if place == "input" or (covariance and place == "down"):
        return value
    if covariance:
        return torch.eye(len(value), dtype=value.dtype, device=value.device) * value.diagonal().mean()
    neurons = 0 if place in ("gate", "up") else -1
    return value.mean(neurons, keepdim=True).expand_as(value).clone()
