"""A random gate on each row of a matrix, pushed shut by a transformed sparsity penalty (TSCNC, arXiv:2503.20454).

Gates are those of Louizos et al. (2018, arXiv:1712.01312): hard-concrete variables, which are 0 and 1 with some
probability each. The paper has them on output channels of convolutions; a row of W (d_out x d_in) is the same of a
linear layer.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ...operators import Operator
from ...operators.scattered import ScatteredRows
from ...parameters import Range
from ..penalties.tscnc.sparsity import transformed
from .registry import parametrization
from .stand_in import StandIn

LOW, HIGH = -0.1, 1.1  # what the gates are stretched to before they are cut off at 0 and 1
MOST = math.log(100)  # of |ln α|, so that no gate is shut or open for good
Positive = Annotated[float, Range(0, above=True)]


class Gated(StandIn):
    """Ŵ = z ⊙ V, with V (d_out x d_in) trained and a gate z_c in [0, 1] for each row; b has no gate.

    While it is trained z_c = cut((HIGH - LOW) s + LOW) with s = sigmoid((ln u - ln(1 - u) + ln α_c) / temperature), u
    uniform, drawn anew for every pass. In evaluation mode s = sigmoid(ln α_c), as in the paper. At the start Ŵ is the
    layer's weight there: V is that over the gate. See `tscnc_gates` for the settings.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, sparse: float, a: float, decay: float, count: float, drop: float,
        temperature: float, speed: float,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias)
        self.sparse, self.a, self.decay, self.count = sparse, a, decay, count
        self.temperature, self.speed = temperature, speed
        open_ = math.log((1 - drop) / drop)
        self.slow = nn.Parameter(torch.full((self.out_features,), open_ / speed))  # ln α over the speed
        start = self.at_rest().detach().double()
        self.values = nn.Parameter((weight.detach().double() / start[:, None].to(weight.device)).to(weight.dtype))  # V

    @property
    def log_alpha(self) -> Tensor:
        """ln α (d_out)."""
        return self.speed * self.slow

    def at_rest(self) -> Tensor:
        """The gates without noise (d_out)."""
        return _cut(torch.sigmoid(self.log_alpha))

    def drawn(self) -> Tensor:
        """Gates at random (d_out)."""
        u = torch.rand_like(self.slow).clamp(1e-6, 1 - 1e-6)
        return _cut(torch.sigmoid((torch.logit(u) + self.log_alpha) / self.temperature))

    def opens(self) -> Tensor:
        """The probability that a drawn gate is not 0 (d_out): sigmoid(ln α - temperature ln(-LOW / HIGH))."""
        return torch.sigmoid(self.log_alpha - self.temperature * math.log(-LOW / HIGH))

    @property
    def weight(self) -> Tensor:
        return self._behind(self.drawn() if self.training else self.at_rest())

    def _behind(self, gates: Tensor) -> Tensor:
        wide = torch.promote_types(self.values.dtype, gates.dtype)
        return (gates.to(wide)[:, None] * self.values.to(wide)).to(self.values.dtype)

    def penalty(self) -> Tensor:
        """sparse Σ_c (a + 1) u_c / (a + u_c), u_c = P(z_c > 0) Σ_w (decay w² / 2 + count).

        A shut gate has none. In the released code u_c has a sign of its own in the denominator, which can then vanish;
        this is the form without.
        """
        wide = self.values if self.values.element_size() >= 4 else self.values.float()
        sizes = self.opens() * (self.decay / 2 * wide.square().sum(1) + self.count * self.in_features)
        return self.sparse * transformed(sizes, self.a).sum()

    @torch.no_grad()
    def after_step(self, gone: float) -> None:
        """Keep α within [0.01, 100]."""
        self.slow.clamp_(-MOST / self.speed, MOST / self.speed)

    @torch.no_grad()
    def finished(self) -> Tensor | Operator:
        """The rows whose gates are open; the matrix itself where that is all or none."""
        gates = self.at_rest()
        weight, kept = self._behind(gates), gates.nonzero()[:, 0]
        if len(kept) in (0, self.out_features):
            return weight
        return ScatteredRows.from_rows(weight[kept], kept, self.out_features)


def _cut(s: Tensor) -> Tensor:
    return ((HIGH - LOW) * s + LOW).clamp(0, 1)


@parametrization("tscnc-gates", paper="arXiv:2503.20454", rate=1e-4)
def tscnc_gates(
    weight: Tensor, bias: Tensor | None, *, sparse: Annotated[float, Range(0)] = 2e-5, a: Positive = 100.0,
    decay: Annotated[float, Range(0)] = 25.0, count: Annotated[float, Range(0)] = 1e-3,
    drop: Annotated[float, Range(0.01, 0.9)] = 0.3, temperature: Positive = 2 / 3, speed: Positive = 100.0,
) -> Gated:  # fmt: skip
    """A random gate on each row of every matrix, which a transformed sparsity penalty pushes shut.

    Adds sparse Σ_c (a + 1) u_c / (a + u_c) over all rows, with u_c = P(gate c is not 0) Σ_w (decay w² / 2 + count) over
    the row's weights. In the end rows with an open gate are stored, and the others are zero but for their bias. For the
    conditioning of what is left add `tscnc` as a penalty.

    sparse: the paper's λ over the number of training examples (1 / 50,000). Its networks train for 78,000 steps: raise
        it for a short training.
    a: below the u of a row the penalty counts open rows, far above it is plain.
    decay: weight decay within u; the paper has 5e-4 times the number of training examples.
    count: price of a weight, whatever it is.
    drop: share of the time that ln α would give to a shut gate at the start (without stretching).
    temperature: below 1 the gates are mostly 0 or 1.
    speed: a step moves ln α so many times as far as a weight (ours; the paper's SGD steps are large).
    """
    return Gated(weight, bias, sparse, a, decay, count, drop, temperature, speed)
