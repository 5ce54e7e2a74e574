"""UltraMemV2 (Huang et al., ICLR 2026, arXiv:2508.18756): a sparsely read memory beside every MLP."""

from .part import UltraMem, grid_side
from .retrieval import best_slots, direction

__all__ = ["UltraMem", "best_slots", "direction", "grid_side"]
