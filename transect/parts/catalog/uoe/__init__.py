"""Union of experts (Yang et al. 2025, arXiv:2503.02495): a trained MLP and attention, cut into experts that add up."""

from .attention import UnionAttention
from .mlp import UnionMLP

__all__ = ["UnionAttention", "UnionMLP"]
