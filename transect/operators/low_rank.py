"""Ŵ = L R with L (d_out x r) and R (r x d_in): two thin linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import bare_linear, parameter_of
from .base import Operator


class LowRank(Operator):
    """y = L(Rx) + b. L and R are `nn.Linear`, so that whatever works on those (LoRA, quantizers) works on them.

    d_in, d_out, rank: sizes, 1 <= rank. bias: whether y has a bias (d_out). linear: makes the two layers.
    """

    kind = "low_rank"

    def __init__(
        self, d_in: int, d_out: int, rank: int, bias: bool, linear: Callable[[int, int, bool], nn.Linear] = nn.Linear
    ) -> None:
        super().__init__(d_in, d_out)
        self.rank = rank
        self.right = linear(d_in, rank, False)  # R
        self.left = linear(rank, d_out, bias)  # L, b

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRank:
        """From L (d_out x r), R (r x d_in) and b (d_out)."""
        with torch.device("meta"):
            operator = cls(right.shape[1], left.shape[0], right.shape[0], bias is not None, bare_linear)
        operator.weight = torch.empty(0, dtype=left.dtype, device=left.device)
        operator.left.weight = parameter_of(left)
        operator.right.weight = parameter_of(right)
        if bias is not None:
            operator.left.bias = parameter_of(bias)
        return operator

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.left.register_parameter("bias", None if bias is None else parameter_of(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))

    def to_dense(self) -> Tensor:
        return self.left.weight @ self.right.weight

    def select(self, rows: Tensor | None, columns: Tensor | None) -> LowRank:
        left, right, bias = self.left.weight, self.right.weight, self.bias
        if rows is not None:
            left, bias = left[rows], None if bias is None else bias[rows]
        if columns is not None:
            right = right[:, columns]
        return LowRank.from_factors(left, right, bias).train(self.training)

    @torch.no_grad()
    def refit(self, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """L = argmin_L E||W x - L R x'||² (SVD-LLM's closed-form update for x = x'). The bias stays out of the target,
        since the layer keeps it; the authors' code counts it twice.
        """
        right, covariance = self.right.weight.double(), covariance.double()  # r x d_in, d_in x d_in
        seen = right @ covariance  # R C
        gram = seen @ right.T  # R C Rᵀ
        # A direction of R that these inputs never excite keeps its old coefficient instead of an arbitrary one.
        left = self.left.weight.double()
        wanted = seen.T if cross is None else cross.double() @ right.T  # E[x x'ᵀ] Rᵀ
        residual = weight.double() @ wanted - left @ gram  # E[(W x - L R x') (R x')ᵀ]
        self.left.weight.copy_(left + residual @ torch.linalg.pinv(gram, hermitian=True))

    @property
    def flops(self) -> int:
        return 2 * self.rank * (self.in_features + self.out_features)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "rank": self.rank,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> LowRank:
        return cls(description["in"], description["out"], description["rank"], description["bias"], bare_linear)
