"""The two norms of today's models: what every other norm is compared with."""

from __future__ import annotations

from torch import Tensor, nn

from ..part import Norm


class RMS(Norm):
    """x / rms(x) * g (Zhang & Sennrich 2019)."""

    kind = "norm.rms"
    paper = "arXiv:1910.07467"
    limit = "it is the standard part"

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Layer(Norm):
    """(x - mean) / sqrt(var + eps) * g + b (Ba et al. 2016)."""

    kind = "norm.layer"
    paper = "arXiv:1607.06450"
    limit = "it is the standard part"

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)
