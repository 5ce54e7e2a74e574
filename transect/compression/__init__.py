"""Compression methods, one file each in `catalog/`, and the frame that runs them."""

from . import catalog  # noqa: F401 - importing a method registers it
from .allocation import RankTable, allocation_named, allocations
from .compress import compress_anatomy
from .recipe import Recipe
from .registry import (
    Calibration,
    Method,
    Parameter,
    Range,
    Size,
    factorization,
    method,
    methods,
    replacement,
    restructuring,
    slicing,
)
from .weighted_svd import Factorization, weighted_svd

__all__ = [
    "Calibration", "Factorization", "Method", "Parameter", "Range", "RankTable", "Recipe", "Size", "allocation_named",
    "allocations", "compress_anatomy", "factorization", "method", "methods", "replacement", "restructuring", "slicing",
    "weighted_svd",
]  # fmt: skip
