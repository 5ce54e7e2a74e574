"""Attention with random heads that are not trained (Fu et al., NeurIPS 2023, arXiv:2307.11353).

Not the Random Feature Attention of Peng et al. (ICLR 2021, arXiv:2103.02143), which is an approximation of the softmax.
"""

from .layer import RandomHeadsAttention
from .regression import (
    RandomHeadsRegression,
    attention_features,
    attention_kernel,
    fitted,
    mlp_features,
    random_heads,
    random_units,
    ridge,
)

__all__ = [
    "RandomHeadsAttention", "RandomHeadsRegression", "attention_features", "attention_kernel", "fitted", "mlp_features",
    "random_heads", "random_units", "ridge",
]  # fmt: skip
