"""torch's product of bfloat16 vectors with a matrix of 4-bit integers, on a CPU: `_weight_int4pack_mm_for_cpu`.

It reads half a byte a weight where a dense product reads two, and makes no dense matrix. Integers of 2 and 3 bits are
among those of 4, and one of 5 to 8 bits is 16 h + l of two that are. The kernel has no zero points between its steps,
so what they add, s_ig (c - z_ig) Σ_{j in g} x_j with c the integers' middle, is a small product beside it, in float32.
In other types than bfloat16 the kernel is a plain loop and slower than making the matrix (measured, torch 2.13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "_weight_int4pack_mm_for_cpu"
_GROUPS = (32, 64, 128, 256)
_ROWS = 16  # the kernel takes whole sixteens of rows
_TILES = 2  # of its layout; any number that it knows gives the same result


@dataclass(frozen=True)
class Int4:
    """A matrix as the kernel wants it: for each half byte the packed integers and their scales; and the zero points'
    part (d_out x groups), float32."""

    halves: list[tuple[Tensor, Tensor]]
    offsets: Tensor
    group: int

    @classmethod
    def of(cls, codes: Tensor, zeros: Tensor | None, scale: Tensor, bits: int, group: int) -> Int4:
        """Of integers (d_out x d_in), zero points and scales (d_out x groups); see `GroupedInteger`."""
        wide = scale.float()
        zero = torch.full_like(wide, 2 ** (bits - 1)) if zeros is None else zeros.float()
        middle = 2 ** (bits - 1)  # of the integers; the kernel takes 8 off each, so fewer bits are put around its 8
        if bits <= 4:
            parts = [(codes + (8 - middle), wide)]
        else:
            parts, middle = [(codes & 15, wide), ((codes >> 4) + (8 - middle // 16), 16 * wide)], middle + 8
        halves = []
        for half, strength in parts:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(half.int(), _TILES)
            pairs = torch.stack([strength, torch.zeros_like(strength)], -1).transpose(0, 1).bfloat16().contiguous()
            halves.append((packed, pairs))
        return cls(halves, wide * (middle - zero), group)

    def multiply(self, x: Tensor) -> Tensor:
        """Ŵ x of each vector (... x d_in), float32."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.float().unflatten(1, (-1, self.group)).sum(-1) @ self.offsets.T
        for packed, pairs in self.halves:
            y += torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), packed, self.group, pairs)
        return y.view(*x.shape[:-1], -1)


def knows(operator: Any) -> bool:
    """Whether there is a kernel for this operator: bfloat16 on a CPU, and sizes that it takes.

    Not for tensors made in inference mode: whether the kernel's layout still is theirs cannot be seen (`Remade`).
    """
    return (
        operator.scale.dtype == torch.bfloat16
        and not (operator.codes.is_inference() or operator.scale.is_inference())
        and operator.scale.device.type == "cpu"
        and operator.group in _GROUPS
        and operator.in_features % operator.group == 0
        and operator.out_features % _ROWS == 0
        and hasattr(torch.ops.aten, NAME)
    )
