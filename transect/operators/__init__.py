"""Structured stand-ins for dense linear maps: ordinary `nn.Module`s, rebuilt from a JSON description.

One file a structure; a file put here is known to checkpoints, nothing else has to list it.
"""

from ..modules import import_all
from .base import Described, Operator, flops_of, stored_bytes
from .build import build, described_kinds, operator_kinds
from .low_rank import LowRank
from .shared import Bank, Shared

import_all(__name__, __path__)

__all__ = [
    "Bank", "Described", "LowRank", "Operator", "Shared", "build", "described_kinds", "flops_of", "operator_kinds",
    "stored_bytes",
]  # fmt: skip
