"""Block affine updates."""

from __future__ import annotations

import math
from typing import Annotated, Any

from ..registry import Range, adapter


def _numbers(d_out: int, d_in: int, block: int) -> int | None:
    """B is (d_out / block) square matrices."""
    return None if d_out % block or d_in % block else d_out * block


@adapter("bone", paper="arXiv:2409.15371", size="block", numbers=_numbers, largest=math.gcd, only_linear=True)
def bone(paths: list[str], *, block: Annotated[int, Range(1, 2**20)] = 64) -> Any:
    """One square matrix B_i for each row of blocks W_ij of the weight: W_ij + W_ij B_i + B_i, with B zero at the start.

    PEFT has it as the form "bat" of MiSS, which is used here. Taking back what was merged inverts I + B in float32: if
    that is nearly singular, another weight comes back without a word, so load the model anew then.

    block: the side of a block; it divides both sides of every weight.
    """
    from peft import MissConfig

    return MissConfig(r=block, init_weights="bat", target_modules=paths)
