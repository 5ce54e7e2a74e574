"""How many principal components hold a share of a layer's variance."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import TransectError


def pca_dim(states: Tensor, eta: float) -> int:
    """Fewest principal components of H (T x d) whose variances sum to more than the share eta of all of it.

    From 1 to min(d, T - 1); 0 where all rows are the same. Raises TransectError for an eta that is not above 0 and
    below 1, fewer than two rows, and numbers that are not finite.
    """
    if states.dim() != 2:
        raise TransectError(f"expected the activations of some tokens (T x d), got shape {tuple(states.shape)}")
    scatter = Scatter()
    scatter.add(states)
    return scatter.dimension(eta)


class Scatter:
    """Σ (h - h̄)(h - h̄)ᵀ of rows h (d) that come part by part, however they are cut into parts.

    Sums are taken about the first part's mean, so that a large mean costs no digits, and added up in float64; products
    within a part are in the precision of the rows, at least float32. Memory: d² numbers.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.about = self.sum = self.gram = torch.empty(0)

    def add(self, states: Tensor) -> None:
        """Some rows (T x d). Raises TransectError where they are not finite."""
        if not torch.isfinite(states).all():
            raise TransectError("activations are not finite: look for NaN or infinite weights")
        if len(states) == 0:
            return
        precise, states = torch.promote_types(states.dtype, torch.float32), states.double()
        if self.rows == 0:
            self.about = states.mean(0)
            self.sum = torch.zeros_like(self.about)
            self.gram = self.about.new_zeros(len(self.about), len(self.about))
        states = states - self.about
        self.sum += states.sum(0)
        states = states.to(precise)
        self.gram += states.T @ states
        self.rows += len(states)

    def variances(self) -> Tensor:
        """Those along the principal components, times T - 1, falling, at least 0 (min(d, T - 1)).

        The eigenvalues beyond that many are zero but for rounding.
        """
        if self.rows < 2:
            raise TransectError(f"principal components need the activations of at least two tokens, got {self.rows}")
        centred = self.gram - torch.outer(self.sum, self.sum) / self.rows
        values = torch.linalg.eigvalsh(centred).flip(0).clamp_min(0)
        return values[: self.rows - 1]

    def dimension(self, eta: float) -> int:
        """See `pca_dim`."""
        if not 0 < eta < 1:
            raise TransectError(f"eta={eta:g} must be above 0 and below 1: it is the share of the variance to be held")
        values = self.variances()
        total, noise = values.sum(), len(self.gram) * torch.finfo(torch.float64).eps
        if total <= noise * (self.rows * self.about.square().sum() + self.gram.trace()):
            return 0  # what rounding leaves of rows that are all the same
        shares = values.cumsum(0) / total
        return min(int((shares <= eta).sum()) + 1, len(values))
