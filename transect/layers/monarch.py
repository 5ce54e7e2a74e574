"""A linear layer that is a Monarch matrix, to train (Dao et al., ICML 2022, arXiv:2204.00595).

    block.mlp.up.replace(MonarchLinear(d_in, d_out, bias=False))

End to end from scratch, from a dense layer (`from_linear`), or, by the paper's reverse sparsification, with Monarch
matrices for most of the steps and multiplied out for the last ones (`to_linear`). It is the operator `Monarch` with an
initialisation, so a model with such layers is saved and loaded like any compressed one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..anatomy.storage import dense
from ..operators.monarch import Monarch, project_to_monarch


class MonarchLinear(Monarch):
    """A stand-in for `nn.Linear(in_features, out_features, bias)`.

    blocks: number of input and of output blocks, at most the smaller of both sizes. channels: rank of every pair of
    blocks. Default: as many as the authors' layer has, whose blocks between the factors are as wide as the smaller of
    input and output blocks; that is half of the dense parameters for a square layer of 4 blocks. Where blocks do not
    divide this width it is rounded down (our choice).
    Raises TransectError where the sizes do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocks: int = 4,
        channels: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if channels is None:
            channels = max(1, math.ceil(min(in_features, out_features) / max(blocks, 1)) // max(blocks, 1))
        super().__init__(in_features, out_features, blocks, blocks, channels, bias)
        self.to(device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Both factors uniform in ±1/√fan_in, with the length of their rows as fan_in; the bias in ±1/√d_out."""
        for factor in (self.first, self.second):
            nn.init.uniform_(factor, -(factor.shape[-1] ** -0.5), factor.shape[-1] ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.out_features**-0.5), self.out_features**-0.5)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, blocks: int = 4, channels: int | None = None) -> MonarchLinear:
        """The nearest such layer to a dense one, computed in float64: what dense-to-sparse training starts from."""
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None,
            blocks=blocks, channels=channels, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        first, second = project_to_monarch(weight.double(), blocks, blocks, layer.channels)
        with torch.no_grad():
            layer.first.copy_(first)
            layer.second.copy_(second)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same, to go on training."""
        linear: Any = dense(self.to_dense(), self.bias)
        return linear
