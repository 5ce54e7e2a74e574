"""A trained projection to heads in one module: the matrix, the norm that its model puts behind it, shared heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy.storage import bare_linear
from ..operators.base import Described
from .precision import wide


class Projection(Described):
    """x (..., inputs) -> (..., heads * repeats * head size): norm(W x + b), each head `repeats` times side by side.

    norm: "none", "head" (over the channels of each head) or "all" (over all of them); with gains and shifts of their
    own for every channel. centred: whether the norm takes the mean off (LayerNorm). exponent: its epsilon is 10 to the
    minus this. repeats: of heads that serve several of queries, for mixers that have as many of both.
    """

    kind = "projection"
    matrix = "linear"  # where in it the matrix is, see `anatomy.Block.matrix`

    def __init__(
        self, inputs: int, heads: int, head_size: int, bias: bool, norm: str, centred: bool, exponent: int, repeats: int
    ) -> None:
        super().__init__()
        self.heads, self.head_size, self.norm, self.centred, self.repeats = heads, head_size, norm, centred, repeats
        self.exponent = exponent
        self.linear = bare_linear(inputs, heads * head_size, bias)
        self.gain = self.shift = None
        if norm != "none":
            self.gain = nn.Parameter(torch.ones(heads * head_size))
            self.shift = nn.Parameter(torch.zeros(heads * head_size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.gain is not None and self.shift is not None:
            normed, eps = wide(y), 10.0**-self.exponent
            normed = normed.unflatten(-1, (self.heads, self.head_size)) if self.norm == "head" else normed
            norm = functional.layer_norm if self.centred else functional.rms_norm
            y = (norm(normed, normed.shape[-1:], eps=eps).reshape(y.shape) * self.gain + self.shift).to(y.dtype)
        if self.repeats == 1:
            return y
        heads = y.unflatten(-1, (self.heads, 1, self.head_size))
        return heads.expand(*heads.shape[:-2], self.repeats, self.head_size).flatten(-3)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.linear.in_features, "heads": self.heads, "head_size": self.head_size,
            "bias": self.linear.bias is not None, "norm": self.norm, "centred": int(self.centred),
            "exponent": self.exponent, "repeats": self.repeats,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Projection:
        if description["norm"] not in ("none", "head", "all"):
            raise ValueError(f"a projection has no norm {description['norm']!r}")
        inputs, heads, size, bias = (description[name] for name in ("in", "heads", "head_size", "bias"))
        centred, exponent, repeats = (description[name] for name in ("centred", "exponent", "repeats"))
        return cls(inputs, heads, size, bias, description["norm"], bool(centred), exponent, repeats)
