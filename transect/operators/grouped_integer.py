"""Integers of a few bits, with a scale and a zero point for each group of consecutive entries of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from .base import Operator
from .coded import Coded
from .int4_kernel import NAME, Int4, knows
from .remade import Remade

BITS = (2, 3, 4, 5, 6, 8)


class GroupedInteger(Remade, Coded):
    """y = Ŵx + b, where Ŵ_ij = s_ig (q_ij - z_ig): q_ij is an integer from 0 to 2^bits - 1, g the group of column j.

    scale s (d_out x groups) has the model's dtype; the zero points z are integers of `bits` bits, and a symmetric one
    stores none and has z = 2^(bits - 1). codes and zeros (uint8) are the integers, packed: see `pack`. The last group
    is shorter where `group` does not divide d_in.

    Ŵ is made anew in every call, which costs a pass over it and saves the memory. Where torch has a kernel for it
    (`int4_kernel`), the integers are used as they are; they are then there twice, once in the kernel's own layout.
    """

    kind = "grouped_integer"

    def __init__(self, d_in: int, d_out: int, bits: int, group: int, symmetric: bool, bias: bool) -> None:
        super().__init__(d_in, d_out)
        self.bits, self.group = bits, group
        self.groups = -(-d_in // group)
        self.scale = nn.Parameter(torch.empty(d_out, self.groups))
        self.register_buffer("codes", torch.zeros(packed_bytes(d_out * d_in, bits), dtype=torch.uint8))
        zeros = None if symmetric else torch.zeros(packed_bytes(d_out * self.groups, bits), dtype=torch.uint8)
        self.register_buffer("zeros", zeros)
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)

    codes: Tensor
    zeros: Tensor | None

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, group: int) -> GroupedInteger:
        """Of integers q (d_out x d_in), scales s and zero points z (d_out x groups); no z for a symmetric one."""
        d_out, d_in = codes.shape
        operator = cls(d_in, d_out, bits, group, zeros is None, False).to(scale)
        operator.codes = pack(codes, bits)
        operator.zeros = None if zeros is None else pack(zeros, bits)
        operator.scale = parameter_of(scale)
        return operator

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def integers(self) -> tuple[Tensor, Tensor | None]:
        """q (d_out x d_in) and z (d_out x groups), uint8, unpacked."""
        d_out = self.out_features
        codes = unpack(self.codes, self.bits, d_out * self.in_features).view(d_out, -1)
        zeros = self.zeros
        return codes, None if zeros is None else unpack(zeros, self.bits, d_out * self.groups).view(d_out, -1)

    def forward(self, x: Tensor) -> Tensor:
        other = x.dtype != self.scale.dtype or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if other or not knows(self):
            return super().forward(x)
        y = self._for_the_kernel().multiply(x)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def kernel(self) -> str:
        """What computes its products without gradients: torch's kernel by name, or "dense" for a matrix made anew."""
        return NAME if knows(self) else "dense"

    def _for_the_kernel(self) -> Int4:
        held = [self.codes, self.scale, *([] if self.zeros is None else [self.zeros])]
        return self.remade(held, lambda: Int4.of(*self.integers(), self.scale, self.bits, self.group))

    def to_dense(self) -> Tensor:
        codes, zeros = self.integers()
        return dequantized(codes, self.scale, zeros, self.bits, self.group)

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Operator:
        if columns is not None:
            return super().select(rows, columns)
        codes, zeros = self.integers()
        chosen = slice(None) if rows is None else rows
        made = self.from_codes(
            codes[chosen], self.scale[chosen], None if zeros is None else zeros[chosen], self.bits, self.group
        )
        made.set_bias(None if self.bias is None else self.bias[chosen])
        return made

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "bits": self.bits,
            "group_size": self.group, "symmetric": self.symmetric, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> GroupedInteger:
        if description["bits"] not in BITS or not description["group_size"] > 0:
            raise ValueError(f"bits are one of {BITS} and a group has columns, but this is {description}")
        return cls(
            description["in"], description["out"], description["bits"], description["group_size"],
            description["symmetric"], description["bias"],
        )  # fmt: skip


def dequantized(codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, group: int) -> Tensor:
    """Ŵ (d_out x d_in), in the dtype of the scales (d_out x groups)."""
    d_in = codes.shape[1]
    zero = 2 ** (bits - 1) if zeros is None else zeros[..., None].to(scale.dtype)
    grouped = nn.functional.pad(codes, (0, -d_in % group)).unflatten(1, (-1, group)).to(scale.dtype)
    return ((grouped - zero) * scale[..., None]).flatten(1)[:, :d_in]


def grouped_integer_bytes(d_out: int, d_in: int, bits: int, group: int, symmetric: bool, itemsize: int) -> int:
    """What `GroupedInteger` stores of a matrix: the packed integers, and for each group a scale and a zero point."""
    groups = d_out * -(-d_in // group)
    zeros = 0 if symmetric else packed_bytes(groups, bits)
    return packed_bytes(d_out * d_in, bits) + groups * itemsize + zeros


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed integers."""
    return sum(-(-count * part // 8) for part in _parts(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1, of 1 to 8 bits, as bytes (uint8): 8 / bits in each, the first in the lowest bits.

    Where that does not divide, the bits go in parts that do: of 3, the lower two of all come first, then the highest.
    """
    packed, flat = [], codes.reshape(-1).to(torch.uint8)
    for part in _parts(bits):
        a_byte = 8 // part
        low = nn.functional.pad(flat & (2**part - 1), (0, -len(flat) % a_byte)).view(-1, a_byte)
        packed.append((low << _shifts(part, low)).sum(1, dtype=torch.uint8))
        flat = flat >> part if part < 8 else flat
    return torch.cat(packed)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` of the packed integers (uint8)."""
    found, start, below = None, 0, 0
    for part in _parts(bits):
        stop = start + -(-count * part // 8)
        spread = (packed[start:stop, None] >> _shifts(part, packed)) & (2**part - 1)
        values = spread.flatten()[:count]
        found = values if found is None else found | values << below
        start, below = stop, below + part
    assert found is not None
    return found


def _parts(bits: int) -> tuple[int, ...]:
    return tuple(part for part in (8, 4, 2, 1) if bits & part)


def _shifts(part: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, part, dtype=torch.uint8, device=like.device)
