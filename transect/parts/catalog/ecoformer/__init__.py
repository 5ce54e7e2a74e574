"""EcoFormer (Liu et al., NeurIPS 2022, arXiv:2209.09004): linear attention between short binary codes of positions."""

from .energy import Work, ecoformer_work, softmax_work
from .hashing import (
    Hash,
    anchor_kernel,
    binary_codes,
    codes_of,
    hard_losses,
    learned_hash,
    learned_projection,
    random_hash,
    similarity_labels,
)
from .layer import EcoFormer

__all__ = [
    "EcoFormer", "Hash", "Work", "anchor_kernel", "binary_codes", "codes_of", "ecoformer_work", "hard_losses",
    "learned_hash", "learned_projection", "random_hash", "similarity_labels", "softmax_work",
]  # fmt: skip
