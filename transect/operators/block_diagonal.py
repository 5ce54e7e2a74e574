"""Block-diagonal maps, and a 2:4 sparse matrix between two of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from .base import Operator
from .semi_structured import SemiStructured, semi_structured_bytes


class BlockDiagonal(nn.Module):
    """y = Dx with D (size x size) zero outside square blocks on its diagonal: `blocks` (size / block, block, block)."""

    def __init__(self, size: int, block: int) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.empty(size // block, block, block))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, self.blocks.shape[:2])  # (..., n, block)
        return torch.einsum("nij,...nj->...ni", self.blocks, parts).flatten(-2)


class WrappedSparse(Operator):
    """y = A C B x + b: a 2:4 sparse core C between block-diagonal A (d_out x d_out) and B.

    Where 4 does not divide d_in, x gets zeros at its end, and B and C have as many columns more.
    output_block, input_block: block sizes of A and B; they divide d_out and the padded d_in.
    """

    kind = "wrapped_sparse"

    def __init__(self, d_in: int, d_out: int, output_block: int, input_block: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        padded = 4 * -(-d_in // 4)
        self.right = BlockDiagonal(padded, input_block)  # B
        self.core = SemiStructured(padded, d_out, False)  # C
        self.left = BlockDiagonal(d_out, output_block)  # A
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)

    @classmethod
    def from_parts(cls, left: Tensor, core: Tensor, mask: Tensor, right: Tensor, d_in: int) -> WrappedSparse:
        """From the blocks of A and B, each (n, block, block), C (d_out x padded d_in) and the mask of its entries."""
        operator = cls(d_in, len(core), left.shape[-1], right.shape[-1], False).to(core)
        operator.left.blocks = parameter_of(left)
        operator.right.blocks = parameter_of(right)
        operator.core = SemiStructured.from_dense(core, mask)
        return operator

    @property
    def kernel(self) -> Literal["dense", "semi-structured"]:
        """How the core computes: see `SemiStructured.kernel`."""
        return self.core.kernel

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, self.core.in_features - self.in_features))
        y = self.left(self.core(self.right(x)))
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Tensor:
        left, right = self.left.blocks, self.right.blocks
        inner = torch.einsum("onj,nji->oni", self.core.to_dense().unflatten(1, right.shape[:2]), right).flatten(1)
        whole = torch.einsum("nij,njd->nid", left, inner.unflatten(0, left.shape[:2])).flatten(0, 1)
        return whole[:, : self.in_features].contiguous()

    @property
    def flops(self) -> int:
        return self.core.flops + 2 * (self.left.blocks.numel() + self.right.blocks.numel())

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features,
            "output_block": self.left.blocks.shape[-1], "input_block": self.right.blocks.shape[-1],
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> WrappedSparse:
        return cls(*(description[key] for key in ("in", "out", "output_block", "input_block", "bias")))


def wrapped_sparse_bytes(d_out: int, d_in: int, output_block: int, input_block: int, itemsize: int) -> int:
    """What `WrappedSparse` stores of a matrix."""
    padded = 4 * -(-d_in // 4)
    wrappers = d_out * output_block + padded * input_block
    return semi_structured_bytes(d_out, padded, itemsize) + wrappers * itemsize
