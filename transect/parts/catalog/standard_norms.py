"""The two norms of today's models: what every other norm is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import TransectError
from ..part import Norm


class RMS(Norm):
    """x / rms(x) * g, plus b where it has one (Zhang & Sennrich 2019).

    bias: whether there is a b, as in LayerNorm: on a stream whose channels have mean 0, it then is LayerNorm.
    """

    kind = "norm.rms"
    paper = "arXiv:1910.07467"
    limit = "it is the standard part"

    def __init__(self, width: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return y if self.bias is None else y + self.bias


class Layer(Norm):
    """(x - mean) / sqrt(var + eps) * g + b (Ba et al. 2016)."""

    kind = "norm.layer"
    paper = "arXiv:1607.06450"
    limit = "it is the standard part"

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        if width < 2:
            raise TransectError(f"norm.layer of one number gives its bias alone: a width of 2 or more, not {width}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
