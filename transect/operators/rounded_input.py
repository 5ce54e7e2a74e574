"""Another operator whose inputs are rounded to integers of a few bits, with one step for the whole tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Operator
from .build import build


class RoundedInput(Operator):
    """y = f(σ round(clamp((x + β₁) / σ, -2^(bits - 1), 2^(bits - 1) - 1)) + β₂), f an operator.

    What integer arithmetic would see, computed in floating point: no time is saved by it.

    inner: f. step: σ > 0. before, after: β₁ and β₂ (d_in). bits: from 2 to 8.
    """

    kind = "rounded_input"

    def __init__(self, inner: Operator, bits: int) -> None:
        super().__init__(inner.in_features, inner.out_features)
        if not 2 <= bits <= 8:
            raise ValueError(f"inputs are rounded to 2 to 8 bits, not {bits}")
        self.inner, self.bits = inner, bits
        self.step = nn.Parameter(torch.ones(()))
        self.before, self.after = (nn.Parameter(torch.zeros(inner.in_features)) for _ in range(2))

    @property
    def bias(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.inner.set_bias(bias)

    @property
    def flops(self) -> int:
        return self.inner.flops

    def forward(self, x: Tensor) -> Tensor:
        n = 2 ** (self.bits - 1)
        return self.inner(self.step * ((x + self.before) / self.step).clamp(-n, n - 1).round() + self.after)

    def to_dense(self) -> Tensor:
        """Ŵ of f: the rounding of inputs is no linear map."""
        return self.inner.to_dense()

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Operator:
        made = RoundedInput(self.inner.select(rows, columns), self.bits).to(self.step)
        made.step.data = self.step.detach().clone()
        for name in ("before", "after"):
            held = getattr(self, name).detach()
            getattr(made, name).data = (held if columns is None else held[columns]).clone()
        return made.train(self.training)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "bits": self.bits,
            "inner": self.inner.describe(),
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> RoundedInput:
        inner = build(description["inner"], inside=True)
        if not isinstance(inner, Operator) or isinstance(inner, RoundedInput):
            raise ValueError("what reads rounded inputs should be an operator")
        return cls(inner, description["bits"])
