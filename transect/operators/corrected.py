"""Integers of a few bits, and a low-rank correction of what rounding to them lost."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Operator
from .build import build
from .grouped_integer import GroupedInteger
from .low_rank import LowRank


class Corrected(Operator):
    """y = Qx + L(Rx) + b, with Q (d_out x d_in) integers in groups and L R of low rank.

    integers: Q, without a bias. correction: L, R and b, in the model's dtype.
    """

    kind = "corrected"

    def __init__(self, integers: GroupedInteger, correction: LowRank) -> None:
        super().__init__(integers.in_features, integers.out_features)
        if (correction.out_features, correction.in_features) != (integers.out_features, integers.in_features):
            raise ValueError(f"{correction.describe()} is no correction of {integers.describe()}: they differ in shape")
        if integers.bias is not None:
            raise ValueError("the integers of a corrected matrix have no bias: its correction has it")
        self.integers, self.correction = integers, correction

    @property
    def bias(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.correction.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.correction.set_bias(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x) + self.correction(x)

    def to_dense(self) -> Tensor:
        return self.integers.to_dense() + self.correction.to_dense()

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Operator:
        integers: Any = self.integers.select(rows, columns)
        return Corrected(integers, self.correction.select(rows, columns)).train(self.training)

    @property
    def flops(self) -> int:
        return self.integers.flops + self.correction.flops

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features,
            "integers": self.integers.describe(), "correction": self.correction.describe(),
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Corrected:
        integers = build(description["integers"], inside=True)
        correction = build(description["correction"], inside=True)
        if not isinstance(integers, GroupedInteger) or not isinstance(correction, LowRank):
            raise ValueError("a corrected matrix should be integers in groups and low-rank factors")
        return cls(integers, correction)
