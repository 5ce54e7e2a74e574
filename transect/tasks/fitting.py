"""What a linear fit of the examples in a prompt says of each from those before it: what models are held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def fitted(x: Tensor, y: Tensor, penalty: float = 0.0) -> Mapping[str, Tensor]:
    """Name -> answers (count x m x k), each example's from those before it: x (count x m x n), y (count x m x k).

    The answer 0; the mean of x yᵀ; least squares, the shortest of the best; and ridge with that penalty, which is least
    squares where it is 0. All in float64.
    """
    x, y = x.double(), y.double()
    said = {name: torch.zeros_like(y) for name in ("nothing", "averaging", "least squares", "ridge")}
    for i in range(1, x.shape[1]):
        before, labels, asked = x[:, :i], y[:, :i], x[:, i : i + 1]
        solved = torch.linalg.pinv(before) @ labels  # count x n x k
        precision = before.mT @ before + penalty * torch.eye(x.shape[-1], dtype=x.dtype)
        shrunk = torch.linalg.solve(precision, before.mT @ labels) if penalty else solved
        averaged = (before[..., None] * labels[:, :, None]).mean(dim=1)
        for name, w in (("averaging", averaged), ("least squares", solved), ("ridge", shrunk)):
            said[name][:, i] = (asked @ w)[:, 0]
    return said
