"""A matrix that other places of the model share, and a low-rank correction that is this place's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..anatomy.storage import bare_linear, laid_out, parameter_of, select
from .base import Operator
from .build import build
from .low_rank import LowRank


class Relaxed(Operator):
    """y = Wx + L(Rx) + b, with W (d_out x d_in) and b in a layer of their own, which other places may hold as well.

    Two products: L R is never added into W, since that is another's, too. matrix: W and b. correction: L and R, without
    a bias. What shares W is said elsewhere: see `anatomy.ties`.
    """

    kind = "relaxed"

    def __init__(self, matrix: nn.Linear, correction: LowRank) -> None:
        super().__init__(matrix.in_features, matrix.out_features)
        if (correction.out_features, correction.in_features) != (matrix.out_features, matrix.in_features):
            raise ValueError(
                f"{correction.describe()} is no correction of a {matrix.out_features} x {matrix.in_features} matrix"
            )
        if correction.bias is not None:
            raise ValueError("the correction of a relaxed matrix has no bias: the matrix itself has it")
        self.matrix, self.correction = matrix, correction

    @property
    def bias(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.matrix.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.matrix.register_parameter("bias", None if bias is None else parameter_of(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(x) + self.correction(x)

    def to_dense(self) -> Tensor:
        return self.matrix.weight + self.correction.to_dense()

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Relaxed:
        matrix: Any = select(self.matrix, rows, columns)
        return laid_out(Relaxed(matrix, self.correction.select(rows, columns))).train(self.training)  # type: ignore

    @property
    def flops(self) -> int:
        return 2 * self.in_features * self.out_features + self.correction.flops

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "rank": self.correction.rank,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Relaxed:
        inputs, outputs = description["in"], description["out"]
        correction = build({**description, "kind": LowRank.kind, "bias": False}, inside=True)
        assert isinstance(correction, LowRank)
        return cls(bare_linear(inputs, outputs, description["bias"]), correction)
