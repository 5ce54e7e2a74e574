"""XᵀX at half the cost and in half the memory: only the panels on and above the diagonal are computed and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Small enough that little of the lower triangle is computed, large enough that each product runs at full speed.
_PANELS = 8
_SMALLEST_PANEL = 128
_NAME = "gram."


def gram_zeros(n: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The sums of a Gram matrix (n x n) before any data, by name: panels of its rows, w in each.

    The one that begins with row i holds the columns from i on (w x (n - i)). With b panels that are (b + 1) / (2 b) of
    the matrix's numbers: 56 % with 8.
    """
    step = max(_SMALLEST_PANEL, -(-n // _PANELS))
    return {
        f"{_NAME}{start}": torch.zeros(min(step, n - start), n - start, dtype=dtype, device=device)
        for start in range(0, n, step)
    }


def is_gram(sums: Mapping[str, Tensor]) -> bool:
    """Whether these are the sums of a Gram matrix."""
    return f"{_NAME}0" in sums


def add_gram_(sums: Mapping[str, Tensor], x: Tensor) -> None:
    """Add XᵀX, X (rows x n), to its panels in place; below the diagonal, numbers of a panel stay meaningless.

    The products run in X's precision (float32 if X is narrower) and are added in the sums'. They cost as much of the
    full product as is kept of it.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    for start, panel in _panels(sums):
        left = x[:, start : start + len(panel)].T
        if panel.dtype == x.dtype:
            panel.addmm_(left, x[:, start:])
        else:
            panel += left @ x[:, start:]


def symmetric(sums: Mapping[str, Tensor]) -> Tensor:
    """The full symmetric matrix (n x n); a new tensor."""
    first = sums[f"{_NAME}0"]
    full = first.new_empty(first.shape[1], first.shape[1])
    for start, panel in _panels(sums):
        stop = start + len(panel)
        upper = panel[:, : len(panel)].triu()
        full[start:stop, start:stop] = upper + upper.triu(1).T
        full[start:stop, stop:] = panel[:, len(panel) :]
        full[stop:, start:stop] = panel[:, len(panel) :].T
    return full


def _panels(sums: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The panels, and at which row and column each begins."""
    for name, tensor in sums.items():
        if name.startswith(_NAME):
            yield int(name.removeprefix(_NAME)), tensor
