"""2:4 sparsity: the best mask of a score, and what it costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OutOfReach
from ..operators.semi_structured import SemiStructured, semi_structured_bytes
from .registry import Size

ENGINES = "2:4 sparsity is fast on few engines: vLLM, for one, has removed its kernels for it (its PR 36799)"


def best_two_of_four(score: Tensor) -> Tensor:
    """Mask of the two largest scores in every four consecutive columns; of equal ones the first.

    score: at least 0 (d_out x d_in). Returns bool (d_out x d_in rounded up to a multiple of 4): columns beyond d_in are
    chosen only where a group has fewer than two others.
    """
    groups = torch.nn.functional.pad(score, (0, -score.shape[1] % 4), value=-1.0).unflatten(1, (-1, 4))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True).flatten(1)


def two_four(weight: Tensor, score: Tensor) -> SemiStructured:
    """W with the two best-scored entries of every four, unchanged, and zeros elsewhere."""
    return SemiStructured.from_dense(weight, best_two_of_four(score))


def two_four_size(shape: tuple[int, int], itemsize: int, keep: float, **settings: Any) -> Size:
    """The one size of a 2:4 matrix, where the budget pays for it."""
    return fitting(Size(semi_structured_bytes(*shape, itemsize), {}), shape, itemsize, keep, "2:4 sparsity")


def fitting(size: Size, shape: tuple[int, int], itemsize: int, keep: float, what: str) -> Size:
    """The size, or OutOfReach where it is more than `keep` of the dense bytes."""
    dense = shape[0] * shape[1] * itemsize
    if size.bytes > keep * dense:
        raise OutOfReach(
            f"{what} stores at least {size.bytes / dense:.4f} of a {shape[0]} x {shape[1]} matrix of "
            f"{itemsize}-byte numbers, positions included, and keep={keep:g} is less; raise it"
        )
    return size


def normalized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W̄, ρ and c with W = diag(ρ) W̄ diag(c): columns first, then rows. 1e-5 keeps zero rows and columns zero."""
    columns = torch.linalg.vector_norm(weight, dim=0) + 1e-5
    rows = torch.linalg.vector_norm(weight / columns, dim=1) + 1e-5
    return weight / columns / rows[:, None], rows, columns


def usable(importance: Tensor) -> Tensor:
    """Feature weights over their mean; those that are zero or not finite count as the mean of the others."""
    valid = torch.isfinite(importance) & (importance > 0)
    if not valid.any():
        return torch.ones_like(importance)
    return torch.where(valid, importance / importance[valid].mean(), 1)
