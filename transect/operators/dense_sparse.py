"""Column blocks, each with dense bases of its own and row-sparse coefficients: DSFormer (arXiv:2312.13211).

The inputs are cut into B blocks of c. Ŵ_β = S_β D_β with D_β (k x c) dense and S_β (d_out x k) of exactly s non-zeros
in every row, so that Ŵ x = Σ_β S_β (D_β x_β).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from ..errors import TransectError
from .dictionary import Combining, SparseRows


class BlockBases(nn.Module):
    """z_β = D_β x_β for every block: `weight` D (B x k x c). Zeros follow x where B c is more than it has. z: B k."""

    def __init__(self, blocks: int, bases: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, bases, width))

    def forward(self, x: Tensor) -> Tensor:
        blocks, _, width = self.weight.shape
        parts = nn.functional.pad(x, (0, blocks * width - x.shape[-1])).unflatten(-1, (blocks, width))
        return torch.einsum("nkc,...nc->...nk", self.weight, parts).flatten(-2)

    def dense(self, d_in: int) -> Tensor:
        """D as one matrix with a block of rows for each block of columns (B k x d_in)."""
        blocks, bases, width = self.weight.shape
        whole = self.weight.new_zeros(blocks, bases, blocks, width)
        whole.diagonal(dim1=0, dim2=2).copy_(self.weight.permute(1, 2, 0))
        return whole.view(blocks * bases, -1)[:, :d_in]


class DenseSparse(Combining):
    """y = Σ_β S_β (D_β x_β) + b.

    Stored: D, B k c numbers; the non-zeros, d_out B s; and where they are, one bit for each of the B k bases in whole
    bytes a row, d_out ceil(B k / 8). The coefficients of all blocks are one `SparseRows` over the B k bases.

    d_in, d_out: sizes. blocks: B, of ceil(d_in / B) columns; the last columns may be zeros that x does not have.
    bases: k. nonzeros: s, from 1 to k. bias: whether y has a bias (d_out).
    """

    kind = "dense_sparse"

    def __init__(self, d_in: int, d_out: int, blocks: int, bases: int, nonzeros: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        if not 1 <= blocks <= d_in or not 1 <= nonzeros <= bases <= d_out:
            raise TransectError(
                f"{blocks} blocks with {nonzeros} of {bases} bases a row do not fit a {d_out} x {d_in} matrix: take 1 "
                f"to {d_in} blocks, at most {d_out} bases, and 1 to as many non-zeros as bases"
            )
        self.bases = BlockBases(blocks, bases, -(-d_in // blocks))
        self.coefficients = SparseRows(blocks * bases, d_out, blocks * nonzeros, bias)

    @classmethod
    def from_blocks(cls, bases: Tensor, values: Tensor, indices: Tensor, d_in: int) -> DenseSparse:
        """From D (B x k x c) and the non-zeros of S (B x d_out x s) with their bases (B x d_out x s); no bias."""
        (blocks, count, _), (_, d_out, nonzeros) = bases.shape, values.shape
        with torch.device("meta"):
            operator = cls(d_in, d_out, blocks, count, nonzeros, False)
        operator.weight = torch.empty(0, dtype=values.dtype, device=values.device)
        operator.bases.weight = parameter_of(bases)
        places = indices + count * torch.arange(blocks, device=indices.device)[:, None, None]
        operator.coefficients = SparseRows.from_entries(
            values.transpose(0, 1).flatten(1), places.transpose(0, 1).flatten(1), blocks * count
        )
        return operator

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficients(self.bases(x))

    def to_dense(self) -> Tensor:
        blocks, bases, _ = self.bases.weight.shape
        coefficients = self.coefficients.dense().unflatten(1, (blocks, bases)).transpose(0, 1)  # B x d_out x k
        whole = (coefficients @ self.bases.weight).transpose(0, 1).flatten(1)
        return whole[:, : self.in_features].contiguous()

    def indices(self) -> Tensor:
        """The bases of the non-zeros, by block and row (B x d_out x s), ascending, counted from 0 in each block."""
        blocks, bases, _ = self.bases.weight.shape
        return self.coefficients.indices().unflatten(1, (blocks, -1)).transpose(0, 1) % bases

    def refit(self, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """The coefficients that are best on their support: least squares, row by row. D and the bias stay."""
        self.coefficients.refit(self.bases.dense(self.in_features), weight, covariance, cross)

    @property
    def flops(self) -> int:
        """Of the bases and of the dense product with S that is computed; only a sparse kernel would save its zeros."""
        return 2 * (self.bases.weight.numel() + self.coefficients.atoms * self.out_features)

    def describe(self) -> dict[str, Any]:
        blocks, bases, _ = self.bases.weight.shape
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "blocks": blocks, "bases": bases,
            "nonzeros": self.coefficients.values.shape[1] // blocks, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> DenseSparse:
        return cls(*(description[key] for key in ("in", "out", "blocks", "bases", "nonzeros", "bias")))


def dense_sparse_bytes(d_out: int, d_in: int, blocks: int, bases: int, nonzeros: int, itemsize: int) -> int:
    """Bytes that `DenseSparse` stores: bases, non-zeros and the bits of their support."""
    numbers = blocks * (bases * -(-d_in // blocks) + d_out * nonzeros)
    return numbers * itemsize + d_out * -(-blocks * bases // 8)
