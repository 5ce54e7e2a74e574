"""LIFT as a method of PEFT."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from peft import PeftType
from torch import nn
from transformers import TrainerCallback

from ....errors import TransectError
from ...tuner import UpdateConfig, UpdateTuner, register_tuner
from .layer import LiftLayer
from .masks import Select


@dataclass
class LiftConfig(UpdateConfig):
    """Settings of LIFT; TransectError for those that mean nothing.

    rank: L, from which the number of trained entries follows: (d_out + d_in) L, and not more than there are.
    filter_rank: R, of the approximation whose largest entries are trained; not the same as `rank`.
    interval: steps after which entries are chosen anew; 0 for never. select: what is large where; see `masks`.
    seed: of the entries that are drawn at random.
    """

    rank: int = 8
    filter_rank: int = 32
    interval: int = 400
    select: Select = "lift"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LIFT")
        for name, least in (("rank", 1), ("filter_rank", 1), ("interval", 0)):
            if (given := getattr(self, name)) < least:
                raise TransectError(f"lift: {name} must be at least {least}, got {given}")
        if self.select not in (known := typing.get_args(Select)):
            raise TransectError(f"lift: select must be one of {', '.join(known)}, got {self.select!r}")


class LiftModel(UpdateTuner):
    """Wraps linear layers in `LiftLayer`s."""

    prefix = "lift_"
    tuner_layer_cls = LiftLayer

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, name: str, target: Any, target_name: str, parent: nn.Module, current_key: str, **more: Any
    ) -> None:
        weight = getattr(target, "weight", None)
        for path, layer in self.model.named_modules():
            if isinstance(layer, LiftLayer) and layer is not target and layer.get_base_layer().weight is weight:
                raise TransectError(f"{current_key} and {path} are one weight: name one of them in target_modules")
        super()._create_and_replace(config, name, target, target_name, parent, current_key, **more)


class RefreshMasks(TrainerCallback):
    """Gives Hugging Face's Trainer what the loop here does after every step: entries are chosen anew in time."""

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        for layer in of["model"].modules():
            if isinstance(layer, LiftLayer):
                layer.after_step(state.global_step, of["optimizer"])


register_tuner("lift", LiftConfig, LiftModel)
