"""The gated MLP of today's language models: what every other MLP is compared with (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from ..part import MLPPart


class GatedMLP(MLPPart):
    """down(f(gate x) * up x).

    function: f.
    """

    kind = "mlp.gated"
    paper = "arXiv:2002.05202"
    limit = "it is the standard part"
    roles = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

    def __init__(self, width: int, neurons: int, *, function: Literal["silu", "gelu", "sigmoid"] = "silu") -> None:
        super().__init__()
        self.function = function
        self.gate_proj = nn.Linear(width, neurons, bias=False)
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gated = gate.sigmoid() if self.function == "sigmoid" else getattr(functional, self.function)(gate)
        return self.down_proj(gated * self.up_proj(x))
