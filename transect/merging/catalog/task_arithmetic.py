"""What several models have learned, added up."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ..registry import Given, Range, merging, tensors_of


@merging("task-arithmetic", paper="arXiv:2212.04089", needs_base=True)
def task_arithmetic(given: Given, *, scale: Annotated[float, Range(-10, 10)] = 0.4) -> dict[str, Tensor]:
    """Add to the base what each model has learned since it: θ_0 + scale Σ_k (θ_k - θ_0).

    A negative scale takes it away from the base: the model forgets (Ilharco et al. 2023).

    scale: of the sum; with one model more than the base's worth, 1 is that model itself. Choose it on held-out text.
    """
    assert given.base is not None  # the frame saw to it
    start, updates = tensors_of(given.base.model), given.updates
    return {name: tensor.float() + scale * sum(one[name] for one in updates) for name, tensor in start.items()}
