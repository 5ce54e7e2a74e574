"""Compression methods, one file each, and the frame that runs them."""

from . import asvd, fwsvd, kfac_svd, svd, svd_llm  # noqa: F401 - importing a method registers it
from .allocation import RankTable, allocation_named, allocations
from .compress import compress_anatomy
from .recipe import Recipe
from .registry import Method, Parameter, Range, factorization, method, methods
from .weighted_svd import Factorization, weighted_svd

__all__ = [
    "Factorization", "Method", "Parameter", "Range", "RankTable", "Recipe", "allocation_named", "allocations",
    "compress_anatomy", "factorization", "method", "methods", "weighted_svd",
]  # fmt: skip
