"""Linear transformers (Katharopoulos et al., ICML 2020, arXiv:2006.16236)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..kernels import KernelAttention


class Linear(KernelAttention):
    """φ(x) = elu(x) + 1: a matrix for each head is all that is remembered."""

    kind = "mixer.linear"
    paper = "arXiv:2006.16236"
    limit = "never softmax attention; its own quadratic form exactly"

    def __init__(self, width: int, heads: int, head_size: int, causal: bool) -> None:
        super().__init__(width, heads, head_size, causal)

    def features(self, x: Tensor, of_keys: bool) -> Tensor:
        return functional.elu(x) + 1
