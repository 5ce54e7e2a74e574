"""Activator (Abdullah et al. 2024, arXiv:2405.15953): a gated unit in the place of attention.

The released code gates channels, so that no position learns anything of another: a measure of how much a task needs
mixing at all. Gating along the positions, as the paper's prose has it, is the other mode, and is Transect's own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..part import Around, Mixer


class Activator(Mixer):
    """W₃(norm(f(W₁x + b₁)) * norm(W₂x + b₂)) + b₃, the two with one layer norm, behind f: the gate is signed.

    mode: `channel`, the released code, each position by itself; or `token`, the same along the positions, for each
        channel by itself: bidirectional, and of a fixed number of positions.
    expansion: the unit is so many times as wide as what it gates.
    gate: f.
    shared_norm: whether both factors have the same norm, as released, or each its own.
    """

    kind = "mixer.activator"
    paper = "arXiv:2405.15953"
    limit = "none: without mixing, it is an MLP; with it, the weights of positions are fixed"
    cost = "N (mode token: N²)"
    recurrent = True

    def __init__(
        self, width: int, length: int, causal: bool, *, mode: Literal["channel", "token"] = "channel",
        expansion: Annotated[float, Range(0, 64, above=True)] = 2.0, gate: Literal["gelu", "silu", "relu"] = "gelu",
        shared_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        if mode == "token" and causal:
            raise TransectError(
                "activator in mode token sees what is behind a position, so it cannot stand in a model that predicts "
                "the next token: choose mode channel, or a base such as vit"
            )
        if mode == "token" and length < 1:
            raise TransectError(
                "activator in mode token needs a fixed number of positions, which this model's config does not give: "
                "choose mode channel"
            )
        self.mode, self.width, self.length, self.gate = mode, width, length, gate
        inputs = width if mode == "channel" else length
        units = max(1, round(expansion * inputs))
        self.first, self.second = nn.Linear(inputs, units), nn.Linear(inputs, units)
        self.norm = nn.LayerNorm(units)
        self.second_norm = None if shared_norm else nn.LayerNorm(units)
        self.out = nn.Linear(units, inputs)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        if self.mode == "channel":
            return self._gated(x)
        count = x.shape[1]
        if count > self.length:
            raise TransectError(f"activator in mode token mixes {self.length} positions at most, and there are {count}")
        if around.real is not None:
            x = x * around.real[..., None].to(x.dtype)
        return self._gated(functional.pad(x.mT, (0, self.length - count))).mT[:, :count]

    def _gated(self, x: Tensor) -> Tensor:
        gate = getattr(functional, self.gate)(self.first(x))
        norm = self.norm if self.second_norm is None else self.second_norm
        return self.out(self.norm(gate) * norm(self.second(x)))

    @property
    def flops(self) -> int:
        return super().flops if self.mode == "channel" else 0

    def mixing_flops(self, length: int) -> int:
        return 0 if self.mode == "channel" else super().flops * self.width
