"""Another map whose inputs are integer spike counts times a threshold of each position (SpikingBrain's, 2509.05276)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import describe, is_dense, parameter_of, read_weight, select
from .base import Operator, flops_of
from .build import build

LEAST, MOST = 1e-5, 1e4  # of a threshold


def spike_counts(x: Tensor, k: Tensor | float) -> tuple[Tensor, Tensor]:
    """Signed counts s (the shape of x, whole numbers) and the threshold V (... x 1) of each position: s V is near x.

    V = mean |x| / k within [1e-5, 1e4], over the last dimension; s = round(x / V), in float32 or wider.
    """
    x = x if x.dtype == torch.float64 else x.float()
    threshold = (x.abs().mean(-1, keepdim=True) / k).clamp(LEAST, MOST)
    return (x / threshold).round(), threshold


class Spiking(Operator):
    """y = f(V s), f a map, with `spike_counts` s and thresholds V of the input.

    What spikes would carry, computed in floating point: no time is saved by it. The gradient passes the rounding as if
    there were none. An input that is not finite has no counts; it is not looked for in each call, and what comes out is
    not finite either, as of any matrix.

    inner: f, an operator or a linear layer. k: by what the mean is divided.
    """

    kind = "spiking"

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self.inner = inner
        self.register_buffer("k", torch.ones(()))

    k: Tensor

    @property
    def bias(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.inner.bias = None if bias is None else parameter_of(bias)

    @property
    def flops(self) -> int:
        return flops_of(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        s, threshold = spike_counts(x, self.k)
        coded = (s * threshold).to(x.dtype)
        return self.inner(x + (coded - x).detach() if x.requires_grad else coded)

    def to_dense(self) -> Tensor:
        """Ŵ of f: counting spikes is no linear map."""
        return read_weight(self.inner)

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Operator:
        made = Spiking(select(self.inner, rows, columns)).train(self.training)
        made.k = self.k.clone()
        return made

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "in": self.in_features, "out": self.out_features, "inner": describe(self.inner)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Spiking:
        inner: nn.Module = build(description["inner"], inside=True)
        if isinstance(inner, Spiking) or not (isinstance(inner, Operator) or is_dense(inner)):
            raise ValueError("what reads spikes should be an operator or a linear layer")
        return cls(inner)
