"""Claims of the universal approximation theorem for one layer (Gumaan, 2025, arXiv:2507.10581)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...parts.construction import error_curve
from ..context import Context
from ..registry import Result, Verdict, claim

WIDTHS = (16, 64, 256, 1024)
SAMPLES = 4000
FAR, NEAR = 0.7, 0.1  # shares of the target's spread


@claim(
    "uat-single-layer/both-ingredients",
    method="uat-single-layer",
    paper="arXiv:2507.10581",
    statement="One attention layer and one ReLU network, built by formula, come ever nearer to a function of the whole "
    "sequence as the network widens; without attention, or without positions, no width helps.",
)
def both_ingredients(context: Context) -> Result:
    """Three tokens of one number in [-1, 1]: sin(2 x₁ x₂) + x₃, x₁ x₃ and |x₁ - x₂|. The model plays no part."""
    rows = error_curve(target, 3, 1, widths=WIDTHS, samples=SAMPLES)
    shares = {
        (attention, positions): [
            row["rms"] / row["spread"] for row in rows if (row["attention"], row["positions"]) == (attention, positions)
        ]
        for attention, positions in ((True, True), (False, True), (True, False))
    }
    whole = shares[True, True]
    falls = all(wide < narrow for narrow, wide in pairwise(whole)) and whole[-1] < NEAR
    needs = min(shares[False, True]) > FAR and min(shares[True, False]) > FAR
    return Result(
        Verdict.of(falls and needs),
        f"Error as a share of the target's spread, from width {WIDTHS[0]} to {WIDTHS[-1]}: {whole[0]:.2f} to "
        f"{whole[-1]:.3f} with both, {shares[False, True][-1]:.2f} without attention and {shares[True, False][-1]:.2f} "
        "without positions",
        rows,
    )


def target(x: Tensor) -> Tensor:
    """Another function of all three tokens at each position (S x 3 x 1)."""
    a, b, c = x[..., 0].unbind(1)
    return torch.stack([torch.sin(2 * a * b) + c, a * c, (a - b).abs()], dim=1)[..., None]
