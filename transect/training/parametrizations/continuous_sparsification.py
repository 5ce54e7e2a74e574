"""A mask on every weight, soft at first and hard in the end (Savarese, Silva and Maire 2020, arXiv:1912.04427).

The weights themselves stay. It is how Chang and Bergen (2025, arXiv:2504.15471) find their subnetworks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from torch import Tensor, nn

from ...operators import Operator
from ...operators.sparse import Sparse, sparse_bytes
from ...parameters import Range
from .registry import parametrization
from .stand_in import StandIn, Together

NEVER = -1e6  # s of a weight that is 0: a mask on it would change nothing
UNDECIDED = (0.1, 0.9)  # between these a soft mask is neither shut nor open


class SoftlyMasked(StandIn):
    """Ŵ = M ⊙ W, M = σ(τ s) with s (d_out x d_in, at least 32 bits) trained; W and b stay as they are.

    In evaluation mode, and in the end, M = 1 where s > 0 and 0 elsewhere. See `continuous_sparsification`.
    """

    sharpness: Tensor  # τ

    def __init__(self, weight: Tensor, bias: Tensor | None, start: float, sharp: float) -> None:
        super().__init__(weight, bias)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.frozen = nn.Parameter(weight.detach(), requires_grad=False)  # W itself: it is never written to
        wide = torch.promote_types(weight.dtype, torch.float32)
        scores = torch.full(weight.shape, start, dtype=wide, device=weight.device)
        self.scores = nn.Parameter(scores.masked_fill_(self.frozen == 0, NEVER))  # s
        self.sharp = sharp
        self.register_buffer("sharpness", torch.ones((), dtype=wide))

    def soft(self) -> Tensor:
        """M while it is trained (d_out x d_in), in [0, 1]."""
        return torch.sigmoid(self.sharpness * self.scores)

    def hard(self) -> Tensor:
        """M in the end (d_out x d_in), as booleans."""
        return self.scores.detach() > 0

    @property
    def weight(self) -> Tensor:
        if not self.training:
            return self.frozen * self.hard()
        with torch.autocast(self.frozen.device.type, enabled=False):
            soft = self.soft()
            return (soft * self.frozen.to(soft.dtype)).to(self.frozen.dtype)

    def after_step(self, gone: float) -> None:
        """τ grows by the same factor in every step, from 1 to `sharp`."""
        self.sharpness.fill_(self.sharp**gone)

    @torch.no_grad()
    def finished(self) -> Tensor | Operator:
        mask, (d_out, d_in) = self.hard(), self.frozen.shape
        kept, itemsize = int(mask.sum()), self.frozen.element_size()
        if kept > 0 and sparse_bytes(d_out, d_in, kept, itemsize) < self.frozen.numel() * itemsize:
            return Sparse.from_dense(self.frozen, mask)
        return self.frozen * mask


class Priced(Together):
    """A price on the mean of all soft masks, so that a weight costs the same in every matrix."""

    @property
    def _masked(self) -> list[SoftlyMasked]:
        return [one for one in self.stand_ins.values() if isinstance(one, SoftlyMasked)]

    def penalty(self, again: Callable[[], Tensor]) -> Tensor | None:
        """(λ / |M|) Σ M."""
        if not self.settings["price"]:
            return None
        sums = torch.stack([one.soft().sum().float() for one in self._masked])
        return self.settings["price"] * sums.sum() / self._count

    @torch.no_grad()
    def told(self) -> Mapping[str, float]:
        kept = sum(int(one.hard().sum()) for one in self._masked)
        between = 0
        for one in self._masked:
            soft = one.soft()
            between += int(((soft > UNDECIDED[0]) & (soft < UNDECIDED[1])).sum())
        return {"share of the weights that are kept": kept / self._count, "undecided over kept": between / max(1, kept)}

    @property
    def _count(self) -> int:
        return sum(one.scores.numel() for one in self._masked)


@parametrization("continuous-sparsification", paper="arXiv:1912.04427", rate=1e-2, rest=False, together=Priced)
def continuous_sparsification(
    weight: Tensor, bias: Tensor | None, *, price: Annotated[float, Range(0)] = 10.0, start: float = 0.0,
    sharp: Annotated[float, Range(1)] = 1000.0,
) -> SoftlyMasked:  # fmt: skip
    """Which weights to keep is trained, and no weight is changed: a mask on each, soft at first and hard in the end.

    Adds price times the mean of all masks to the loss, so that it keeps a weight only if that lowers the loss enough.
    A mask is σ(τ s); τ grows from 1 to `sharp` over the steps, and in the end a weight is kept where s > 0. The papers
    let τ grow by a factor a step or an epoch; here the factor follows from the number of steps, since with too few the
    masks would stay soft. Each weight has one more number, with its gradient and what the optimizer holds.

    price: of the share of the weights that is kept, in nats (λ).
    start: of every s. 0 halves all weights at first; 5 begins near the model.
    sharp: τ in the end.
    """
    return SoftlyMasked(weight, bias, start, sharp)
