"""The frame of our own adapters, as tuners of PEFT: a linear layer whose weight an adapter changes.

A method is a config, a layer and a line that registers both. What the layer trains it says in `build`, and what that
makes of the weight in `delta`; activating, merging, taking back, saving and loading are PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..errors import TransectError


@dataclass
class UpdateConfig(PeftConfig):
    """What every config of ours has.

    target_modules: paths of the linear layers, or their last parts, or a regular expression, as in PEFT.
    exclude_modules: the same, for layers that are left alone. modules_to_save: modules that are trained as they are.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)


class UpdateLayer(nn.Module, BaseTunerLayer):
    """y = (W + delta) x + b with W (d_out x d_in) frozen, whichever way the wrapped layer stores it.

    A subclass names its parameter dictionaries in `adapter_layer_names` (each begins with the tuner's prefix) and its
    other dictionaries by adapter in `other_param_names`.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: Any, inference_mode: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = name
        self.out_features, self.in_features = self.weight.shape
        self.prepare()
        self.update_layer(name, config, inference_mode)

    @property
    def is_transposed(self) -> bool:
        """Whether the wrapped layer stores d_in x d_out, as GPT-2's does."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, d_out x d_in; a view of what is stored."""
        stored: Tensor = self.get_base_layer().weight.detach()  # type: ignore[assignment]
        return stored.T if self.is_transposed else stored

    def prepare(self) -> None:
        """Make the empty dictionaries of parameters."""
        raise NotImplementedError

    def build(self, name: str, config: Any) -> None:
        """Make what the adapter trains. Raises TransectError for a setting that does not fit the weight."""
        raise NotImplementedError

    def delta(self, name: str) -> Tensor:
        """What the adapter adds to the weight, d_out x d_in, in the type of its parameters."""
        raise NotImplementedError

    def added(self, name: str, x: Tensor) -> Tensor:
        """What it adds to the output (..., d_out) for x (..., d_in); by the matrix, unless a subclass knows better."""
        return functional.linear(x, self.delta(name))

    def update_layer(self, name: str, config: Any, inference_mode: bool = False) -> None:
        """Add an adapter. TransectError for a weight with which none can work."""
        weight = self.weight
        if not weight.is_floating_point():
            raise TransectError(f"the weight is stored as {weight.dtype}: open the model with its weights as numbers")
        if weight.device.type != "meta" and not bool(weight.isfinite().all()):
            raise TransectError("the weight of a layer that is to be adapted holds NaN or infinite numbers")
        self.build(name, config)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def adapters(self) -> list[str]:
        """Those that are active and have something in this layer."""
        held = getattr(self, self.adapter_layer_names[0])
        return [name for name in self.active_adapters if name in held]

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *arguments, **named)
        if self.disable_adapters or self.merged:
            return output
        for name in self.adapters():
            output = output + self.added(name, self._cast_input_dtype(x, self.dtype_of(name))).to(output.dtype)
        return output

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that an adapter computes in."""
        return getattr(self, self.adapter_layer_names[0])[name].dtype

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active adapters (or those named) into the weight; a ValueError, with `safe_merge`, if NaN comes."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in getattr(self, self.adapter_layer_names[0]):
                self._add(self.delta(name), safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take back what was merged, the last first; to the rounding of the weight's type."""
        while self.merged_adapters:
            self._add(-self.delta(self.merged_adapters.pop()), False)

    def get_delta_weight(self, name: str) -> Tensor:
        """The change as the wrapped layer stores weights."""
        return self.delta(name).T if self.is_transposed else self.delta(name)

    def _add(self, delta: Tensor, safe: bool) -> None:
        changed = (self.weight + delta).to(self.weight.dtype)
        if safe and not bool(changed.isfinite().all()):
            raise ValueError("the merged weight would hold NaN or infinite numbers; it is left as it is")
        self.weight.copy_(changed)


class UpdateTuner(BaseTuner):
    """Wraps every target. A subclass has `prefix` and `tuner_layer_cls`."""

    tuner_layer_cls: type[UpdateLayer]
    target_module_mapping: dict[str, list[str]] = {}
    accepts: Sequence[type[nn.Module]] = (nn.Linear, Conv1D)

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, name: str, target: Any, target_name: str, parent: nn.Module, current_key: str, **_: Any
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(name, config, inference_mode=config.inference_mode)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, tuple(self.accepts)):
            kinds = ", ".join(kind.__name__ for kind in self.accepts)
            raise TransectError(f"{current_key} is a {type(base).__name__}; {config.peft_type} adapts {kinds}")
        try:
            layer = self.wrap(target, name, config, current_key)
        except TransectError as reason:
            raise TransectError(f"{current_key}: {reason}") from None
        if name not in self.active_adapters:  # a further adapter does not train by itself
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def wrap(self, target: Any, name: str, config: Any, path: str) -> UpdateLayer:
        """The layer around a target. path: the target's, which matters where layers of one place go together."""
        return self.tuner_layer_cls(target, name, config, inference_mode=config.inference_mode)


def register_tuner(name: str, config: type[UpdateConfig], model: type[UpdateTuner]) -> None:
    """Make PEFT know a method of ours: `get_peft_model`, `PeftModel.from_pretrained` and adapter folders then take it.

    PEFT keeps its methods in an enumeration that has no room for others, so that a member is added to it.
    """
    key = name.upper()
    if key not in PeftType.__members__:
        member: Any = str.__new__(PeftType, key)
        member._name_, member._value_ = key, key
        PeftType._member_map_[key] = PeftType._value2member_map_[key] = member
        PeftType._member_names_.append(key)
        type.__setattr__(PeftType, key, member)
    register_peft_method(name=name, config_cls=config, model_cls=model)
