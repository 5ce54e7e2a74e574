"""SVFit as a method of PEFT."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from peft import PeftType

from ....errors import TransectError
from ...tuner import UpdateConfig, UpdateTuner, register_tuner
from .layer import SvfitLayer
from .spectrum import Select


@dataclass
class SvfitConfig(UpdateConfig):
    """Settings of SVFit; TransectError for those that mean nothing.

    r: how many singular values of each weight are trained; None for as few as carry the share `energy` of the sum of
    their squares. relative: train the factors by which they change (ours). select: which values; see `spectrum`.
    seed: of those that are drawn at random.
    """

    r: int | None = None
    energy: float = 0.99
    relative: bool = False
    select: Select = "leading"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SVFIT")
        if self.r is not None and self.r < 1:
            raise TransectError(f"svfit: r must be at least 1, or None for as many as carry the energy, got {self.r}")
        if not 0 < self.energy <= 1:
            raise TransectError(f"svfit: energy must be above 0 and at most 1, got {self.energy}")
        if self.select not in (known := typing.get_args(Select)):
            raise TransectError(f"svfit: select must be one of {', '.join(known)}, got {self.select!r}")


class SvfitModel(UpdateTuner):
    """Wraps linear layers in `SvfitLayer`s."""

    prefix = "svfit_"
    tuner_layer_cls = SvfitLayer


register_tuner("svfit", SvfitConfig, SvfitModel)
