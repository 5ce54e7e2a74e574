"""Attention without a softmax, through landmarks (SOFT: Lu et al., NeurIPS 2021 and IJCV 2024, arXiv:2207.03341).

Queries are keys, and the similarity of two positions is a Gaussian kernel of their distance. S is replaced by its
Nyström approximation Pᵀ A⁺ P, with A the kernel of m landmarks and P that of landmarks and positions.
"""

from __future__ import annotations

from math import isqrt
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..part import Around, Mixer
from ..rotary import rotated


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x_i - y_j|² / 2), of ... x n x d and ... x m x d: ... x n x m; in [0, 1], and 1 where they are equal."""
    sizes = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (x @ y.mT - sizes / 2).clamp(max=0).exp()


class SymmetricInverse(torch.autograd.Function):
    """A⁻¹ of symmetric positive matrices (... x m x m) by Newton's iteration Z ← 2 Z - Z A Z from Z = α A.

    α = 1.8 / |A|₁² for each matrix, under 2 / |A|², so that |I - A Z| falls in every step; condition κ takes about
    2 log₂ κ of them. The gradient is that of the inverse, -Zᵀ G Zᵀ, and no step is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, iterations: int) -> Tensor:
        z = 1.8 / a.abs().sum(-1).amax(-1)[..., None, None] ** 2 * a
        for _ in range(iterations):
            z = 2 * z - z @ a @ z
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return -z.mT @ grads[0] @ z.mT, None


def segment_weights(real: Tensor, landmarks: int, dtype: torch.dtype) -> Tensor:
    """What each landmark is the mean of: rows of weights (B x m x N) over segments of the real positions (B x N).

    A sequence of n real positions is cut into min(m, n) segments as equal as can be; the other landmarks have no
    weights.
    """
    place, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)
    segments = count.clamp(max=landmarks)
    of = torch.div(place * segments, count.clamp(min=1), rounding_mode="floor")
    own = ((of[:, None] == torch.arange(landmarks, device=real.device)[:, None]) & real[:, None]).to(dtype)
    return own / own.sum(-1, keepdim=True).clamp(min=1)


class Soft(Mixer):
    """Y = Pᵀ A⁺ P V from right to left: P = κ(landmarks, q), A = κ(landmarks, landmarks), one q for queries and keys.

    κ(x, y) = exp(-|x - y|² / (2 sqrt(head size))). Landmarks are means: of segments of a sequence, or of squares of a
    map of positions, which a class position may precede. A depthwise convolution of the values, one kernel for each
    head, is added. The model's rotary positions, where it has any, turn q. A landmark looks
    ahead, so that there is no causal form. The paper's blocks norm after the sum; here the block is the model's.

    landmarks: m; of a map, a square number whose root divides the map's side.
    positions: `sequence`, or `map` where they are the rows of a square one after the other.
    scale: `degrees` puts D^-½ on both sides of A⁺, D its row sums, which bounds the output by the positions that a
        landmark stands for; `mean` divides by their number too, so that the length does not matter; `none` is the
        form of the conference paper, for blocks that norm after the sum.
    local: side of the convolution's kernel, odd; 0 for none.
    iterations: of the inverse.
    ridge: added to the diagonal of A, since landmarks may be nearly the same.
    """

    kind = "mixer.soft"
    paper = "arXiv:2207.03341"
    limit = "never softmax attention; with every position a landmark it is attention by the whole Gaussian kernel"
    can_be = ("bidirectional",)
    cost = "N"
    roles = {"q": "q_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(
        self, width: int, heads: int, head_size: int, length: int, causal: bool, *,
        landmarks: Annotated[int, Range(1, 2**16)] = 49, positions: Literal["sequence", "map"] = "sequence",
        scale: Literal["degrees", "mean", "none"] = "degrees", local: Annotated[int, Range(0, 255)] = 3,
        iterations: Annotated[int, Range(1, 100)] = 20, ridge: Annotated[float, Range(0, 1)] = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        if positions == "map" and isqrt(landmarks) ** 2 != landmarks:
            raise TransectError(f"landmarks of a map should be a square number, such as 16 or 49, not {landmarks}")
        if local and local % 2 == 0:
            raise TransectError(f"the kernel of the convolution of values should have an odd side, not {local}")
        self.heads, self.head_size, self.landmarks, self.local = heads, head_size, landmarks, local
        self.on_map, self.scale, self.iterations, self.ridge = positions == "map", scale, iterations, ridge
        if self.on_map and length:
            self._side(length, None)
        inner = heads * head_size
        self.q_proj, self.v_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(inner, width, bias=False)
        sides = (local, local) if self.on_map else (local,)
        self.kernel = nn.Parameter(torch.randn(heads, 1, *sides) / local ** len(sides)) if local else None

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q, v = (one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q_proj, self.v_proj))
        q = rotated(q, around.rotary)  # B x heads x N x head size
        real = x.new_ones(1, x.shape[1], dtype=torch.bool) if around.real is None else around.real
        q, v = (one * real[:, None, :, None] for one in (q, v))
        side = self._side(x.shape[1], around.real) if self.on_map else 0
        with torch.autocast(x.device.type, enabled=False):  # half precision would not converge
            q, wide = (one if one.dtype == torch.float64 else one.float() for one in (q, v))
            q = q * self.head_size**-0.25
            near, some = self._means_of_squares(q, side) if side else self._means_of_segments(q, real)
            y = self._attend(q, near, wide, some, real)
        y = y.to(v.dtype) + self._beside(v, side) if self.local else y
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))

    def _attend(self, q: Tensor, near: Tensor, v: Tensor, some: Tensor, real: Tensor) -> Tensor:
        """Pᵀ A⁺ P v for landmarks `near`, of which some (B or 1 x m) and the real positions (B or 1 x N) count."""
        both = (some[:, :, None] & some[:, None, :])[:, None]
        a = gaussian_kernel(near, near) * both
        degrees = a.sum(-1, keepdim=True).clamp(min=1)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        inverse = SymmetricInverse.apply(
            a + eye * torch.where(some, self.ridge, 1.0)[:, None, :, None], self.iterations
        )
        p = gaussian_kernel(near, q) * (some[:, :, None] & real[:, None, :])[:, None]  # B x heads x m x N
        if self.scale != "none":
            p = p * degrees.rsqrt()
        y = p.mT @ (inverse @ (p @ v))
        if self.scale == "mean":
            y = y * (some.sum(1) / real.sum(1).clamp(min=1))[:, None, None, None]
        return y

    def _means_of_segments(self, q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Landmarks (B x heads x m x head size) of a sequence, and which of them there are."""
        weights = segment_weights(real, min(self.landmarks, q.shape[2]), q.dtype)
        return weights[:, None] @ q, weights.sum(-1) > 0

    def _means_of_squares(self, q: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """The same of a map; a class position is in none."""
        flat = q[:, :, -side * side :].mT.reshape(-1, self.head_size, side, side)
        near = functional.avg_pool2d(flat, side // isqrt(self.landmarks))
        near = near.flatten(2).mT.unflatten(0, (-1, self.heads))
        return near, q.new_ones(1, near.shape[2], dtype=torch.bool)

    def _beside(self, v: Tensor, side: int) -> Tensor:
        """The convolution of values (B x heads x N x head size) with each head's kernel; zero at a class position."""
        kernel = self.kernel
        assert kernel is not None
        channels = v.transpose(2, 3).transpose(1, 2)  # B x head size x heads x N
        if not side:
            mixed = functional.conv1d(channels.flatten(0, 1), kernel, padding=self.local // 2, groups=self.heads)
        else:
            squares = channels[..., -side * side :].unflatten(-1, (side, side)).flatten(0, 1)
            mixed = functional.conv2d(squares, kernel, padding=self.local // 2, groups=self.heads).flatten(2)
            mixed = functional.pad(mixed, (v.shape[2] - side * side, 0))
        return mixed.unflatten(0, (-1, self.head_size)).transpose(1, 2).transpose(2, 3)

    def _side(self, count: int, real: Tensor | None) -> int:
        """The side of the map; TransectError where the positions are none that its landmarks divide."""
        side = next((isqrt(n) for n in (count, count - 1) if n and isqrt(n) ** 2 == n), 0)
        if not side or side % isqrt(self.landmarks):
            raise TransectError(
                f"{self.kind} was told that positions are a square map, of which {self.landmarks} landmarks are the "
                f"means of equal squares, but there are {count}: choose landmarks whose root divides the side, or "
                "positions=sequence"
            )
        if real is not None and not bool(real.all()):
            raise TransectError(f"{self.kind} knows no padding in a map: use positions=sequence")
        return side

    @property
    def flops(self) -> int:
        kernel = 0 if self.kernel is None else 2 * self.kernel.numel() * self.head_size
        return super().flops + kernel

    def mixing_flops(self, length: int) -> int:
        few = min(self.landmarks, length)
        inverse = (4 * self.iterations + 2) * few**3
        return self.heads * (8 * length * few * self.head_size + 4 * few**2 * self.head_size + inverse)
