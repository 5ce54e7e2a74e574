"""Nyströmformer (Xiong et al., AAAI 2021, arXiv:2102.03902): softmax attention through a few landmarks."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ..attention import Attention, some_real
from ..part import Around


class Nystrom(Attention):
    """softmax(q k̃ᵀ) softmax(q̃ k̃ᵀ)⁺ softmax(q̃ kᵀ) v, all scores over sqrt(head size), with means of segments as q̃, k̃.

    A segment is ceil(N / landmarks) positions (equation 13); padding is in no mean. The pseudoinverse is taken by a
    third-order iteration (equation 11). A mean looks ahead, so that there is no causal form. The depthwise convolution
    that the authors' code adds to the values is left out.

    landmarks: how many, at most.
    iterations: for the pseudoinverse; 0 computes it exactly.
    """

    kind = "mixer.nystrom"
    paper = "arXiv:2102.03902"
    limit = "with every position a landmark it is softmax attention, up to the pseudoinverse"
    can_be = ("bidirectional",)
    cost = "N"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *,
        landmarks: Annotated[int, Range(1, 2**20)] = 64, iterations: Annotated[int, Range(0, 64)] = 6,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        self.landmarks, self.iterations = landmarks, iterations

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        size = -(-q.shape[2] // self.landmarks)
        real = q.new_ones(1, q.shape[2], dtype=torch.bool) if around.real is None else some_real(around.real)
        counts = segments(real[:, None, :, None].to(q.dtype), size)  # B or 1 x 1 x landmarks x 1
        some = counts > 0
        near_q, near_k = (
            segments(one * real[:, None, :, None], size) / counts.clamp(min=1) for one in (q, k)
        )  # B x heads x landmarks x head size
        far = functional.scaled_dot_product_attention(near_q, k, v, attn_mask=real[:, None, None, :])
        with torch.autocast(q.device.type, enabled=False):
            wide_q, wide_k, far = (one if one.dtype == torch.float64 else one.float() for one in (near_q, near_k, far))
            scores = wide_q @ wide_k.mT * self.head_size**-0.5
            middle = scores.masked_fill(~some.mT, float("-inf")).softmax(-1) * some
            far = pseudoinverse(middle, self.iterations) @ far
        return functional.scaled_dot_product_attention(q, near_k, far.to(q.dtype), attn_mask=some.mT)

    def mixing_flops(self, length: int) -> int:
        few = min(self.landmarks, length)
        inverse = (2 + 8 * (self.iterations or 10)) * few**3  # exactly: some ten times the iteration's step
        return self.heads * (8 * length * few * self.head_size + 4 * few**2 * self.head_size + inverse)


def segments(x: Tensor, size: int) -> Tensor:
    """Sums over each `size` positions in a row (... x N x d), the last ones perhaps fewer."""
    return functional.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size)).sum(-2)


def pseudoinverse(a: Tensor, iterations: int) -> Tensor:
    """A⁺ of square matrices (... x m x m): Z ← Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4 from Aᵀ / (|A|₁ |A|∞)."""
    if not iterations:
        return torch.linalg.pinv(a)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    size = a.abs()
    z = a.mT / (size.sum(-1).amax(-1) * size.sum(-2).amax(-1))[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z
