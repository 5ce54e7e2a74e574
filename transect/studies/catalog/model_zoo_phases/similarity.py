"""How alike two models' outputs are: linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import TransectError
from ....forward import at_rest

Outputs = Callable[[Any, Any], Tensor]  # of a model and a batch: a row of features for each example (n x d)


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with columns centred, Frobenius norms: from 0 to 1, and 1 for the same.

    x (n x d), y (n x e): a row for each of the same n examples. It does not change where one of them is turned by an
    orthogonal map, scaled or shifted. The value is too high where n is not far above d and e.
    debiased: each of the three products by its unbiased estimate (Song et al. 2012, as Nguyen et al. 2021,
    arXiv:2010.15327, use it), which takes n >= 4, may come out below 0, and depends on n far less.
    Time: O(n d e), or O(n² (d + e)) where n is smaller. NaN where one of them does not vary.
    Raises TransectError for rows that do not fit, for too few, and for numbers that are not finite.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise TransectError(
            f"CKA compares two tables of the same examples (n x d, n x e), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    least = 4 if debiased else 2
    if len(x) < least:
        raise TransectError(f"CKA needs {least} examples or more, and {len(x)} came")
    x, y = (one.detach().double() - one.detach().double().mean(dim=0) for one in (x, y))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise TransectError("CKA needs finite outputs; look for what overflows in the models")
    squares = _product(x, x, debiased), _product(y, y, debiased)
    if min(squares) <= 0:
        return math.nan
    return _product(x, y, debiased) / math.sqrt(squares[0] * squares[1])


def _product(x: Tensor, y: Tensor, debiased: bool) -> float:
    """⟨X Xᵀ, Y Yᵀ⟩ of centred tables, or its unbiased estimate, both up to the same factor of n."""
    n = len(x)
    plain = float((x @ x.T * (y @ y.T)).sum() if n < max(x.shape[1], y.shape[1]) else (y.T @ x).square().sum())
    if not debiased:
        return plain
    ours, theirs = x.square().sum(dim=1), y.square().sum(dim=1)  # the diagonals, whose part is left out
    return plain - n / (n - 2) * float(ours @ theirs) + float(ours.sum() * theirs.sum()) / ((n - 1) * (n - 2))


@torch.no_grad()
def output_similarity(
    first: Any, second: Any, outputs: Outputs, batches: Sequence[Any], *, debiased: bool = False
) -> float:
    """The mean over batches of the linear CKA of two models' outputs (the model zoo: 10 held-out batches of 128).

    Both in evaluation mode. Of logits over few classes CKA is soon near 1.
    Raises TransectError as `linear_cka`, and without a batch.
    """
    if not len(batches):
        raise TransectError("output similarity needs a batch or more of data, and none came")
    with at_rest(first, second):
        return statistics.fmean(
            linear_cka(outputs(first, batch), outputs(second, batch), debiased=debiased) for batch in batches
        )  # fmt: skip
