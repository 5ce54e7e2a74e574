"""The mixer: queries and keys are one binary code, and a position reads of others by the bits that they share."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ....parameters import Seed
from ...attention import seen_by
from ...part import Around, Mixer
from ...precision import wide
from ...recurrence import decayed_recurrence
from ...rotary import rotated
from .hashing import Hash, codes_of, learned_hash, random_hash


class EcoFormer(Mixer):
    """y_i = Σ_j w_ij v_j / Σ_j w_ij, w_ij = H_i · H_j + c, with codes H of ±1 for the unit vector z of one projection.

    H_i · H_j = b - 2 Hamming, and c > b, so that every weight is positive and a position is given a mean of values:
    H_i (Hᵀ V) + c Σ v over H_i Σ H + c N. The authors' code adds c v_i to the numerator where its own denominator has
    c N; here both have the sum. Of z the gradient goes through the signs; A, the anchors and their means are not
    trained. A fresh part has a random hash; `learn` fits it to what the part is given. The model's rotary positions,
    where it has any, turn z.

    bits: b, of a code.
    anchors: m, that z is compared with.
    offset: c - b, at least 1; the larger, the nearer to the mean of all values.
    seed: of the random hash.
    """

    kind = "mixer.ecoformer"
    paper = "arXiv:2209.09004"
    limit = "never softmax attention; with ever larger offset, or equal codes, the mean of the values"
    cost = "N"
    recurrent = True
    roles = {"q": "qk_proj", "v": "v_proj", "o": "o_proj"}
    anchors: Tensor
    spread: Tensor
    mean: Tensor
    projection: Tensor

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, layer: int, *,
        bits: Annotated[int, Range(1, 4096)] = 16, anchors: Annotated[int, Range(1, 4096)] = 25,
        offset: Annotated[float, Range(1, 1e6)] = 1.0, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        self.heads, self.head_size, self.constant = heads, head_size, bits + offset
        self.soft = False
        inner = heads * head_size
        self.qk_proj, self.v_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(inner, width, bias=False)
        shapes = {
            "anchors": (heads, anchors, head_size), "spread": (heads,), "mean": (heads, anchors),
            "projection": (heads, bits, anchors),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape))
        if self.anchors.device.type != "meta":
            self.take(random_hash(heads, head_size, anchors, bits, seed))

    def take(self, hashed: Hash) -> None:
        """Let the codes be those of this hash, of the same sizes."""
        for name in ("anchors", "spread", "mean", "projection"):
            getattr(self, name).copy_(getattr(hashed, name))

    def learn(self, x: Tensor, around: Around | None = None, **settings: Any) -> None:
        """Learn the hash from inputs of the part (B x N x d), all real; settings: of `learned_hash`."""
        with torch.no_grad():
            z = self.units(x, around or Around())
        self.take(learned_hash(z, *self.projection.shape[:0:-1], **settings))

    def _shared(self, x: Tensor, around: Around) -> Tensor:
        """What is query and key (B x heads x N x head size)."""
        return rotated(self.qk_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), around.rotary)

    def units(self, x: Tensor, around: Around) -> Tensor:
        """z (B x heads x N x head size), in float32 or wider."""
        return functional.normalize(wide(self._shared(x, around)), dim=-1)

    def _softmax(self, x: Tensor, around: Around) -> Tensor:
        z, v = self._shared(x, around), self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = seen_by(x.shape[1], x.shape[1], self.causal, around.real, x.device)
        y = functional.scaled_dot_product_attention(z, z, v, mask, is_causal=self.causal and mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def codes(self, x: Tensor, around: Around) -> Tensor:
        """H (B x heads x N x bits) of ±1."""
        z = self.units(x, around)
        with torch.autocast(x.device.type, enabled=False):  # in half precision near signs would be others
            stored = (self.anchors, self.spread, self.mean, self.projection)
            return codes_of(z, Hash(*(one.to(z.dtype) for one in stored)))

    def mix(self, x: Tensor, around: Around) -> Tensor:
        if self.soft:
            return self._softmax(x, around)
        codes, v = self.codes(x, around), self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        real = x.new_ones(1, x.shape[1]) if around.real is None else around.real
        q = functional.pad(codes, (0, 1), value=1.0)
        k = functional.pad(codes, (0, 1), value=self.constant) * real[:, None, :, None].to(codes.dtype)
        v = functional.pad(v.to(codes.dtype), (0, 1), value=1.0)  # the denominator is the sum of ones
        with torch.autocast(x.device.type, enabled=False):
            if self.causal:
                before = None if around.state is None else around.state.get("memory")
                y, memory = decayed_recurrence(q, k, v, q.new_zeros(*q.shape[:3], 1), before)
                if around.state is not None:
                    around.state["memory"] = memory
            else:
                y = q @ (k.mT @ v)
        y = y[..., :-1] / y[..., -1:].clamp_min(1)  # which it is but where nothing is real
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))

    @property
    def flops(self) -> int:
        return super().flops + 2 * (self.anchors.numel() + self.projection.numel())

    def mixing_flops(self, length: int) -> int:
        return 4 * length * self.heads * (self.projection.shape[1] + 1) * (self.head_size + 1)
