"""Unstructured sparsity: the entries that are not zero, and a bit for every entry that says whether it is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from .expanded import Expanded
from .grouped_integer import pack, packed_bytes, unpack


class Sparse(Expanded):
    """y = Ŵx + b, where Ŵ (d_out x d_in) has non-zeros anywhere.

    values (n) are they, row after row. support (uint8) says where they are: a bit for each entry of Ŵ, row after row,
    eight to a byte, the lowest bit first. It computes with a dense Ŵ, which is no faster than a dense matrix, and
    which is made once where no gradient is needed: see `Expanded`.

    d_in, d_out: sizes. nonzeros: n. bias: whether y has a bias (d_out).
    """

    kind = "sparse"
    support: Tensor

    def __init__(self, d_in: int, d_out: int, nonzeros: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        self.values = nn.Parameter(torch.empty(nonzeros))
        self.register_buffer("support", torch.zeros(packed_bytes(d_out * d_in, 1), dtype=torch.uint8))
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor) -> Sparse:
        """The entries of W (d_out x d_in) that a mask (bool, d_out x d_in) keeps; no bias."""
        d_out, d_in = weight.shape
        with torch.device("meta"):
            operator = cls(d_in, d_out, 0, False)
        operator.weight = weight.new_empty(0)
        operator.values = parameter_of(weight.detach()[mask])
        operator.support = pack(mask, 1)
        return operator

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.values, self.support

    def mask(self) -> Tensor:
        """Where the stored entries are: bool (d_out x d_in)."""
        bits = unpack(self.support, 1, self.out_features * self.in_features)
        return bits.bool().view(self.out_features, self.in_features)

    def to_dense(self) -> Tensor:
        return self.values.new_zeros(self.out_features, self.in_features).masked_scatter(self.mask(), self.values)

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Sparse:
        weight, mask, bias = self.to_dense(), self.mask(), self.bias
        if rows is not None:
            weight, mask, bias = weight[rows], mask[rows], None if bias is None else bias[rows]
        if columns is not None:
            weight, mask = weight[:, columns], mask[:, columns]
        chosen = Sparse.from_dense(weight, mask)
        chosen.set_bias(bias)
        chosen.train(self.training)
        return chosen

    @property
    def flops(self) -> int:
        """Of the stored entries alone; the dense form does those of all."""
        return 2 * self.values.numel()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "nonzeros": self.values.numel(),
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Sparse:
        d_in, d_out, nonzeros = (description[key] for key in ("in", "out", "nonzeros"))
        if nonzeros > d_in * d_out:
            raise ValueError(f"a {d_out} x {d_in} matrix has no {nonzeros} entries")
        return cls(d_in, d_out, nonzeros, description["bias"])


def sparse_bytes(d_out: int, d_in: int, nonzeros: int, itemsize: int) -> int:
    """What `Sparse` stores of a matrix: its non-zeros, and a bit for every entry."""
    return nonzeros * itemsize + packed_bytes(d_out * d_in, 1)
