"""Integers of a few bits whose levels lie on both sides of zero, as many above as below."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grouped_integer import GroupedInteger


class MidRise(GroupedInteger):
    """y = Ŵx + b, where Ŵ_ij = s_ig (q_ij - 2^(bits - 1) + ½): no level is 0.

    Otherwise a symmetric `GroupedInteger`, with the same packed integers, scales and bytes. No format of others has it.
    """

    kind = "mid_rise"

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, group: int) -> GroupedInteger:
        """Of integers q (d_out x d_in) and scales s (d_out x groups). zeros: not stored, as they are all equal."""
        return super().from_codes(codes, scale, None, bits, group)

    def integers(self) -> tuple[Tensor, Tensor | None]:
        """q (d_out x d_in, uint8), unpacked, and z = 2^(bits - 1) - ½ (d_out x groups)."""
        codes, _ = super().integers()
        return codes, torch.full_like(self.scale, 2 ** (self.bits - 1) - 0.5)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> GroupedInteger:
        if not description["symmetric"]:
            raise ValueError(f"levels around zero have no zero points, but this is {description}")
        return super().from_description(description)
