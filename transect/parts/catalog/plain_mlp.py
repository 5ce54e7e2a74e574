"""The MLP of two matrices, with a function between them (Vaswani et al. 2017; squared ReLU: So et al. 2021)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from ..part import MLPPart


class PlainMLP(MLPPart):
    """down(f(up x)).

    function: f; relu2 is the square of relu.
    """

    kind = "mlp.plain"
    paper = "arXiv:1706.03762"
    limit = "it is the standard part of models without a gate"
    roles = {"up": "up_proj", "down": "down_proj"}

    def __init__(
        self, width: int, neurons: int, *, function: Literal["gelu", "relu", "relu2", "silu"] = "gelu"
    ) -> None:
        super().__init__()
        self.function = function
        self.up_proj = nn.Linear(width, neurons)
        self.down_proj = nn.Linear(neurons, width)

    def activated(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return functional.relu(x).square() if self.function == "relu2" else getattr(functional, self.function)(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activated(self.up_proj(x)))
