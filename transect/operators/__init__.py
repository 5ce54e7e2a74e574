"""Structured stand-ins for dense linear maps: ordinary `nn.Module`s, rebuilt from a JSON description."""

from .base import Operator, flops_of, stored_bytes
from .build import build, operator_kinds
from .low_rank import LowRank

__all__ = ["LowRank", "Operator", "build", "flops_of", "operator_kinds", "stored_bytes"]
