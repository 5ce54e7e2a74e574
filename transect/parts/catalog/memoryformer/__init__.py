"""MemoryFormer (Ding et al., NeurIPS 2024, arXiv:2411.12992): the parts, and tables fitted to a trained matrix."""

from .fit import fit_tables
from .part import MemoryMatrix, MemoryMLP, Tables

__all__ = ["MemoryMLP", "MemoryMatrix", "Tables", "fit_tables"]
