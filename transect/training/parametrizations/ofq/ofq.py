"""Oscillation-free quantization-aware training (Liu, Liu and Cheng, ICML 2023, arXiv:2302.02210)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import TransectError
from ....operators import Operator
from ....operators.grouped_integer import GroupedInteger
from ....operators.mid_rise import MidRise
from ....operators.rounded_input import RoundedInput
from ....parameters import Range
from ..registry import parametrization
from ..stand_in import StandIn, Together
from ..straight_through import straight_through
from .oscillation import THRESHOLD, Oscillation
from .quantizers import LEAST_STEP, from_boundary, lsq, lsq_ends, lsq_start, statistic, stats_positions

Bits = Literal[2, 3, 4, 8]
Quantizer = Literal["statsq", "lsq"]


class Activations(nn.Module):
    """x -> LSQ(x + β₁) + β₂ with one step σ for the whole tensor, β₁ and β₂ (d_in) learned, 0 at the start.

    The first input sets σ. All three are held in at least 32 bits, and used as `dtype`, in which they are stored.
    """

    known: Tensor  # whether an input has come

    def __init__(self, d_in: int, bits: int, like: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise TransectError(
                "activation_bits takes its first step from the first input, which is another in every process: train "
                "in one process, or set it to 0"
            )
        self.bits, self.dtype = bits, dtype
        self.step = nn.Parameter(like.new_ones(()))
        self.before, self.after = (nn.Parameter(like.new_zeros(d_in)) for _ in range(2))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        step, before, after = (p.to(self.dtype).to(x.dtype) for p in (self.step, self.before, self.after))
        x = x + before
        if not self.known:
            with torch.no_grad():
                self.step.copy_(lsq_start(x.abs().mean(), self.bits))
                self.known.fill_(True)
            step = self.step.to(self.dtype).to(x.dtype)
        return lsq(x, step, *lsq_ends(self.bits)) + after

    def stored(self, inner: Operator) -> RoundedInput:
        """An operator whose inputs are rounded likewise."""
        made = RoundedInput(inner, self.bits)
        for name, value in {
            "step": self.step.clamp_min(LEAST_STEP),
            "before": self.before,
            "after": self.after,
        }.items():
            getattr(made, name).data = value.detach().to(self.dtype, copy=True)
        return made


class FewBits(StandIn):
    """Ŵ = StatsQ(W), or LSQ(W) with a step for each row; W (d_out x d_in) is trained, in at least 32 bits.

    See `ofq` for the settings.
    """

    held: Tensor  # the confident weights before the next step, NaN for the others; empty before the annealing

    def __init__(
        self, weight: Tensor, bias: Tensor | None, bits: int, weights: Quantizer, activation_bits: int,
        annealing: float, boundary: float, probe: bool,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias)
        if not torch.isfinite(weight).all():
            raise TransectError("the weight is not finite, so that it has no levels")
        self.bits, self.annealing, self.boundary, self.dtype = bits, annealing, boundary, weight.dtype
        self.values = nn.Parameter(weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True))
        self.step = None
        if weights == "lsq":
            self.step = nn.Parameter(lsq_start(self.values.detach().abs().mean(1, keepdim=True), bits))
        self.activations = None
        if activation_bits:
            self.activations = Activations(self.in_features, activation_bits, self.values.detach(), self.dtype)
        self.register_buffer("held", self.values.new_empty(0))
        self.probe = Oscillation(self.codes()) if probe else None

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """Where every weight is among the levels, which are the whole numbers from -n to n - 1 (d_out x d_in), and what
        they are apart in each row (d_out x 1), rounded as it will be stored."""
        if self.step is None:
            scale = statistic(self.values)
            return stats_positions(self.values, scale, self.bits), self._as_stored(scale / 2 ** (self.bits - 1))
        step = self._as_stored(self.step).clamp_min(LEAST_STEP)
        return (self.values / step).clamp(*lsq_ends(self.bits)), step

    def _as_stored(self, step: Tensor) -> Tensor:
        return step.to(self.dtype).to(self.values.dtype)

    def codes(self) -> Tensor:
        """The level of every weight (d_out x d_in, uint8), counted from 0."""
        return (self.grid()[0].round() + 2 ** (self.bits - 1)).to(torch.uint8)

    def confident(self) -> Tensor:
        """Which weights are further than `boundary` from every boundary between two levels."""
        return from_boundary(self.grid()[0], self.bits) > self.boundary

    @property
    def weight(self) -> Tensor:
        mask = self.held.isnan() if self.held.numel() and self.training else None
        if self.step is not None:
            values = self.values if mask is None else straight_through(self.values, self.values, mask)
            return lsq(values, self._as_stored(self.step), *lsq_ends(self.bits))
        positions, step = self.grid()
        return straight_through(self.values, (positions.round() + 0.5) * step, mask)

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = self.activations(x)
        return functional.linear(x, self.weight.to(x.dtype), self.bias)

    @torch.no_grad()
    def after_step(self, gone: float) -> None:
        if self.held.numel():
            self.values.copy_(torch.where(self.held.isnan(), self.values, self.held))
        if self.annealing and gone >= 1 - self.annealing:
            self.held = torch.where(self.confident(), self.values, torch.nan)
        if self.probe is not None:
            self.probe.see(self.codes())

    @torch.no_grad()
    def finished(self) -> Operator:
        kind = MidRise if self.step is None else GroupedInteger
        scale = self.grid()[1].to(self.dtype)
        stored = kind.from_codes(self.codes(), scale, None, self.bits, self.in_features)
        return stored if self.activations is None else self.activations.stored(stored)


class Quantizing(Together):
    """Tells how many weights oscillate, where that is looked at."""

    def told(self) -> Mapping[str, float]:
        found = [one.probe for one in self.stand_ins.values() if isinstance(one, FewBits) and one.probe is not None]
        if not found:
            return {}
        total = sum(probe.codes.numel() for probe in found)
        share = sum(probe.oscillating() for probe in found) / total
        return {f"share of weights that turn back in more than {THRESHOLD:.0%} of the steps": share}


@parametrization("ofq", paper="arXiv:2302.02210", rate=5e-4, together=Quantizing)
def ofq(
    weight: Tensor, bias: Tensor | None, *, bits: Bits = 4, weights: Quantizer = "statsq",
    activation_bits: Annotated[int, Range(0, 8)] = 0, annealing: Annotated[float, Range(0, 1)] = 0.1,
    boundary: Annotated[float, Range(0, 1)] = 0.005, probe: bool = False,
) -> FewBits:  # fmt: skip
    """Train at 2 to 8 bits a weight without weights that go to and fro between two levels.

    Each row has the levels s {±1, ±3, ..., ±(2^bits - 1)} / 2^bits with s = 2 mean |w|, computed anew in every forward;
    the gradient passes the rounding, and what is beyond the ends, as if it were not there (StatsQ). In the last steps
    only weights near a boundary between two levels move (confidence-guided annealing): others get no gradient, and
    after the optimizer's step have their old values again. What stays are integers of so many bits and a scale a row.

    The loss at the start is that of the rounded model: the levels are laid for training, and 3 or 4 bits without it
    lose more than other rounding. The paper trains for hundreds of epochs with a teacher. Its activations have a
    step for each token's position and are offset before and after the rounding; here it is one step a layer, as texts
    have no fixed length. Embeddings and head stay as they are. Its merged queries and keys fit no layer of transformers
    and are mathematics alone (`query_key`).

    bits: of a weight.
    weights: statsq, or lsq with a learned step for each row, which the paper compares with.
    activation_bits: of each layer's inputs, rounded by LSQ: 2 to 8, or 0 to leave them as they are.
    annealing: share of the steps, the last ones, in which only weights near a boundary move.
    boundary: how near that is, as a share of the distance between two levels.
    probe: count how many weights go to and fro, and tell it at the end, of the steps up to the state that is kept.
    """
    if activation_bits == 1:
        raise TransectError("activation_bits=1 leaves no level above zero: take 2 to 8, or 0 for none")
    return FewBits(weight, bias, bits, weights, activation_bits, annealing, boundary, probe)
