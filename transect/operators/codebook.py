"""Weights that are numbers of a small table, with a scale or a table of its own for each group of rows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from .base import Operator
from .coded import Coded
from .grouped_integer import pack, packed_bytes, unpack

Mode = Literal["scale", "multi"]
MODES: tuple[Mode, ...] = ("scale", "multi")
MOST_BITS = 8  # of an index, and of a row's label


class Codebook(Coded):
    """y = Ŵx + b, where Ŵ_ij = a_g c_k ("scale") or Ŵ_ij = c^g_k ("multi"): row i is of group g, entry ij has code k.

    codebook: c (1 x K, or groups x K where each group has its own), K = 2^bits; scale: a (groups), or None: both in the
    model's dtype. indices: every k, in `bits` bits, packed as `pack` does. labels: every row's g, in
    ceil(log2(groups)) bits, None for one group.

    The paper stores no labels: it sorts the rows by their group, and permutes the columns of whatever reads them. That
    is legal for the hidden units of an MLP and for channels within a head, not for the residual stream, and it would
    tie matrices together. Labels work everywhere, and cost under 1 % of a matrix with hundreds of columns.

    Ŵ is made anew in every call, which costs a pass over it and saves the memory.
    """

    kind = "codebook"

    def __init__(self, d_in: int, d_out: int, bits: int, groups: int, mode: Mode, bias: bool) -> None:
        super().__init__(d_in, d_out)
        self.bits, self.groups, self.mode = bits, groups, mode
        self.codebook = nn.Parameter(torch.empty(1 if mode == "scale" else groups, 2**bits))
        self.register_parameter("scale", nn.Parameter(torch.empty(groups)) if mode == "scale" else None)
        self.register_buffer("indices", torch.zeros(packed_bytes(d_out * d_in, bits), dtype=torch.uint8))
        labels = torch.zeros(packed_bytes(d_out, _label_bits(groups)), dtype=torch.uint8) if groups > 1 else None
        self.register_buffer("labels", labels)
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)

    indices: Tensor
    labels: Tensor | None
    scale: Any  # a parameter, or None

    @classmethod
    def from_codes(cls, indices: Tensor, labels: Tensor, codebook: Tensor, scale: Tensor | None) -> Codebook:
        """Of every k (d_out x d_in), every row's g (d_out), c (1 or groups x K) and, for one codebook, a (groups)."""
        d_out, d_in = indices.shape
        bits, groups = codebook.shape[1].bit_length() - 1, len(codebook if scale is None else scale)
        mode = "multi" if scale is None else "scale"
        operator = cls(d_in, d_out, bits, groups, mode, False).to(codebook)
        operator.indices = pack(indices, bits)
        operator.labels = pack(labels, _label_bits(groups)) if groups > 1 else None
        operator.codebook = parameter_of(codebook)
        operator.scale = None if scale is None else parameter_of(scale)
        return operator

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Every k (d_out x d_in) and every row's g (d_out), int64."""
        d_out = self.out_features
        indices = unpack(self.indices, self.bits, d_out * self.in_features).view(d_out, -1).long()
        if self.labels is None:
            return indices, torch.zeros(d_out, dtype=torch.long, device=indices.device)
        return indices, unpack(self.labels, _label_bits(self.groups), d_out).long()

    def table(self) -> Tensor:
        """The K numbers of each group (groups x K)."""
        return self.codebook if self.scale is None else self.scale[:, None] * self.codebook

    def to_dense(self) -> Tensor:
        indices, labels = self.unpacked()
        return self.table()[labels].gather(1, indices)

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Operator:
        if columns is not None:
            return super().select(rows, columns)
        indices, labels = self.unpacked()
        chosen = slice(None) if rows is None else rows
        made = self.from_codes(indices[chosen], labels[chosen], self.codebook, self.scale)
        made.set_bias(None if self.bias is None else self.bias[chosen])
        return made

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "bits": self.bits,
            "groups": self.groups, "mode": self.mode, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Codebook:
        bits, groups, mode = description["bits"], description["groups"], description["mode"]
        if mode not in MODES or not 1 <= bits <= MOST_BITS or not 1 <= groups <= 2**MOST_BITS:
            raise ValueError(
                f"a codebook has 1 to {MOST_BITS} bits, 1 to {2**MOST_BITS} groups and a mode of {MODES}, "
                f"but this is {description}"
            )
        return cls(description["in"], description["out"], bits, groups, mode, description["bias"])


def codebook_bytes(d_out: int, d_in: int, bits: int, groups: int, mode: Mode, itemsize: int) -> int:
    """What `Codebook` stores of a matrix: packed indices and labels, codes and scales."""
    numbers = 2**bits + groups if mode == "scale" else groups * 2**bits
    return packed_bytes(d_out * d_in, bits) + packed_bytes(d_out, _label_bits(groups)) + numbers * itemsize


def _label_bits(groups: int) -> int:
    """Enough to tell the groups apart; 0 for one."""
    return (groups - 1).bit_length()
