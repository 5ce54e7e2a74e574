"""Monarch matrices: two block-diagonal factors and the shuffle between them (Dao et al., ICML 2022, arXiv:2204.00595).

The general rectangular form of the authors' code. A matrix of (m s) x (k p) has k input blocks of p columns each,
contiguous, and m output blocks of s rows each, interleaved: row i belongs to block i mod m. Every pair of an output and
an input block is an s x p sub-matrix of rank at most rho, its channels, and all pairs are independent of one another.
A side that its number of blocks does not divide is filled up with zeros, and cut off again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy.storage import parameter_of
from ..errors import TransectError
from .base import Operator


def monarch_shapes(
    d_in: int, d_out: int, in_blocks: int, out_blocks: int, channels: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the factors: first (k, m rho, p) and second (m, s, k rho), with p and s rounded up.

    Raises TransectError for more blocks than inputs or outputs, and for more channels than a pair has ranks.
    """
    if not (1 <= in_blocks <= d_in and 1 <= out_blocks <= d_out):
        raise TransectError(
            f"a Monarch matrix of shape {(d_out, d_in)} cannot have {out_blocks} x {in_blocks} blocks: there must be "
            "at least one of either, and no more than rows and columns"
        )
    p, s = math.ceil(d_in / in_blocks), math.ceil(d_out / out_blocks)
    if not 1 <= channels <= min(s, p):
        raise TransectError(
            f"a Monarch matrix of shape {(d_out, d_in)} with {out_blocks} x {in_blocks} blocks has pairs of {s} x {p}: "
            f"channels={channels} must be from 1 to {min(s, p)}"
        )
    return (in_blocks, out_blocks * channels, p), (out_blocks, s, in_blocks * channels)


def project_to_monarch(weight: Tensor, in_blocks: int, out_blocks: int, channels: int) -> tuple[Tensor, Tensor]:
    """The factors of the nearest Monarch matrix in the Frobenius norm: the truncated SVD of every pair of blocks.

    weight: W (d_out x d_in), real or complex. The squared error is the sum of all pairs' discarded σ². Each factor gets
    √σ, so that neither is badly scaled. The authors' function covers square W with one channel; this is the same for
    any shape and number of channels. For a complex W the factors are used as they are, without conjugation.
    """
    d_out, d_in = weight.shape
    (k, _, p), (m, s, _) = monarch_shapes(d_in, d_out, in_blocks, out_blocks, channels)
    padded = functional.pad(weight, (0, k * p - d_in, 0, m * s - d_out))
    pairs = padded.view(s, m, k, p).permute(1, 2, 0, 3)  # m, k, s, p
    u, values, vh = torch.linalg.svd(pairs, full_matrices=False)
    scale = values[..., :channels].sqrt()  # m, k, rho
    left = u[..., :channels] * scale[..., None, :]  # m, k, s, rho
    right = vh[..., :channels, :] * scale[..., None]  # m, k, rho, p
    # Channel c of the pair of blocks i (out) and j (in) is row c m + i of first[j] and column j rho + c of second[i].
    first = right.permute(1, 2, 0, 3).reshape(k, channels * m, p)
    second = left.permute(0, 2, 1, 3).reshape(m, s, k * channels)
    return first, second


def monarch_multiply(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """M x for x (..., k p): (..., m s), rows interleaved. Two batched products, and the shuffle between them."""
    (k, q, p), (m, s, r) = first.shape, second.shape
    rows = x.reshape(-1, k, p)
    z = torch.bmm(rows.transpose(0, 1), first.transpose(1, 2))  # k, N, rho m
    z = z.view(k, -1, q // m, m).permute(3, 1, 0, 2).reshape(m, -1, r)  # m, N, k rho
    y = torch.bmm(z, second.transpose(1, 2))  # m, N, s
    return y.permute(1, 2, 0).reshape(*x.shape[:-1], m * s)


def monarch_dense(first: Tensor, second: Tensor) -> Tensor:
    """M ((m s) x (k p)): entry (a m + i, j p + b) is Σ_c second[i, a, j rho + c] first[j, c m + i, b]."""
    (k, q, p), (m, s, _) = first.shape, second.shape
    right, left = first.view(k, q // m, m, p), second.view(m, s, k, q // m)
    return torch.einsum("mskc,kcmp->smkp", left, right).reshape(s * m, k * p)


class Monarch(Operator):
    """y = Mx + b with a Monarch matrix M.

    d_in, d_out: sizes. in_blocks, out_blocks: k and m. channels: rho, the rank of every pair of blocks, at most the
    smaller side of a pair. bias: whether y has a bias (d_out).
    """

    kind = "monarch"

    def __init__(self, d_in: int, d_out: int, in_blocks: int, out_blocks: int, channels: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        first, second = monarch_shapes(d_in, d_out, in_blocks, out_blocks, channels)
        self.channels = channels
        self.first = nn.Parameter(torch.empty(first))  # k, m rho, p
        self.second = nn.Parameter(torch.empty(second))  # m, s, k rho
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    @classmethod
    def from_dense(
        cls, weight: Tensor, in_blocks: int, out_blocks: int, channels: int, bias: Tensor | None = None
    ) -> Monarch:
        """The nearest Monarch matrix to W (d_out x d_in), with the bias b (d_out)."""
        first, second = project_to_monarch(weight.detach(), in_blocks, out_blocks, channels)
        d_out, d_in = weight.shape
        with torch.device("meta"):
            operator = Monarch(d_in, d_out, in_blocks, out_blocks, channels, False)
        operator.weight = torch.empty(0, dtype=weight.dtype, device=weight.device)
        operator.first, operator.second = parameter_of(first), parameter_of(second)
        operator.set_bias(bias)
        return operator

    def forward(self, x: Tensor) -> Tensor:
        k, _, p = self.first.shape
        if k * p != self.in_features:
            x = functional.pad(x, (0, k * p - self.in_features))
        y = monarch_multiply(self.first, self.second, x)[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_dense(self) -> Tensor:
        return monarch_dense(self.first, self.second)[: self.out_features, : self.in_features]

    @property
    def flops(self) -> int:
        return 2 * (self.first.numel() + self.second.numel())

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "in_blocks": self.first.shape[0],
            "out_blocks": self.second.shape[0], "channels": self.channels, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Monarch:
        sizes = [description[key] for key in ("in", "out", "in_blocks", "out_blocks", "channels", "bias")]
        return cls(*sizes)
