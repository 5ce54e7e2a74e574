"""What operators share that store a number for each weight in few bits and make the matrix anew in every call."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Operator


class Coded(Operator):
    """A subclass defines `to_dense` and holds `bias`."""

    @property
    def coded(self) -> int:
        return self.out_features * self.in_features

    @property
    def flops(self) -> int:
        """Those of the dense matrix; making it costs a little for each of its entries besides, once a call."""
        return 2 * self.out_features * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.to_dense(), self.bias)
