"""LLaVA-MoLE as a method of PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ....errors import TransectError
from ...tuner import UpdateConfig, UpdateTuner, register_tuner
from .layer import NO_MERGE, MoleLayer, Place
from .places import projections_of
from .routing import Mlp, Watch


@dataclass
class MoleConfig(UpdateConfig):
    """Settings of the mixture; TransectError for those that mean nothing.

    Targets that are projections of an MLP get experts, and all others one low-rank update, as LoRA has it.
    experts, rank, alpha: E, and the rank of every update and what scales it, divided by the rank. dropout: of what the
    updates read. balance: the weight w of the balance term. pooled: its form, see `routing.balance`.
    soft: all experts by their probability, in place of the most probable one. gate_scale: the chosen expert's update
    times its probability, as in Switch (ours): then the loss trains the router.
    reads, writes: which layers are the projections of an MLP, in a model whose architecture is not known here: the last
    parts of the paths of those that read the MLP's input, and of those that read what it has computed.
    """

    experts: int = 3
    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05
    balance: float = 0.01
    pooled: bool = False
    soft: bool = False
    gate_scale: bool = False
    reads: list[str] | None = None
    writes: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOLE")
        for name, fits, expected in (
            ("experts", self.experts >= 1, "at least 1"),
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", self.alpha > 0, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("balance", self.balance >= 0, "at least 0"),
        ):
            if not fits:
                raise TransectError(f"mole: {name} must be {expected}, got {getattr(self, name)}")
        if self.soft and self.gate_scale:
            raise TransectError("mole: soft weighs every expert by its probability already: leave gate_scale out")
        if (self.reads is None) != (self.writes is None):
            raise TransectError("mole: reads and writes go together: name the projections of both kinds, or of neither")


class MoleModel(UpdateTuner):
    """Wraps linear layers in `MoleLayer`s; the projections of one MLP share a choice."""

    prefix = "mole_"
    tuner_layer_cls = MoleLayer

    def _prepare_model(self, config: Any, model: nn.Module) -> None:
        _maybe_include_all_linear_layers(config, model)
        self.places = _places(model, config)
        self.watch = next(iter(self.places.values())).mlp.watch
        self._check_targets(config, model)

    def _check_targets(self, config: Any, model: nn.Module) -> None:
        """TransectError, before any change, unless every MLP of which a projection is a target can have a router."""
        wrapped = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        targets = [
            path
            for path, _ in model.named_modules()
            if path and not path.startswith(wrapped) and self._check_target_module_exists(config, path)
        ]
        chosen = {path: self.places[path] for path in targets if path in self.places}
        for path in targets:
            if whole := next((one for one in self.places if path.startswith(f"{one}.")), None):
                raise TransectError(f"{path} is a factor of the projection {whole}: mole adapts whole projections only")
            shape = getattr(model.get_submodule(path), "weight", torch.empty(0)).shape
            if len(shape) == 2 and config.rank > min(shape):
                raise TransectError(
                    f"{path}: rank {config.rank} is above what a {shape[0]} x {shape[1]} weight can have"
                )
        if not chosen:
            raise TransectError(
                "mole: no target is a projection of an MLP, so that this would be plain LoRA (use `lora`); the "
                f"projections are {', '.join(list(self.places)[:3])} and so on"
            )
        if config.experts > 1:
            read = {id(place.mlp) for place in chosen.values() if place.reads}
            for path, place in chosen.items():
                if id(place.mlp) not in read:
                    raise TransectError(
                        f"{path} is a target, but none of the projections that read the input of its MLP is, by which "
                        "an expert is chosen: target those, too"
                    )

    def wrap(self, target: Any, name: str, config: Any, path: str) -> MoleLayer:
        return MoleLayer(target, name, config, config.inference_mode, self.places.get(path))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *more: Any, **named: Any) -> None:
        super().inject_adapter(model, adapter_name, *more, **named)
        self.watch.attach(model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self, merge: bool = True, *more: Any, adapter_names: list[str] | None = None, **named: Any
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        model = super()._unload_and_optionally_merge(merge, *more, adapter_names=adapter_names, **named)
        self.watch.detach()
        return model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """TransectError before the first layer is merged."""
        configs: dict[str, Any] = self.peft_config
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in configs and configs[name].experts > 1:
                raise TransectError(NO_MERGE.format(configs[name].experts))


def _places(model: nn.Module, config: Any) -> dict[str, Place]:
    """Path -> place of every projection. What an adapter before has set up is used again."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, MoleLayer)}
    before = {path: layer.place for path, layer in layers.items() if layer.place is not None}
    watch = next((place.mlp.watch for place in before.values()), None) or Watch()
    projections = projections_of(model, config.reads, config.writes)
    mlps = {projections[path].mlp: place.mlp for path, place in before.items() if path in projections}
    return {
        path: Place(mlps.setdefault(at.mlp, Mlp(at.mlp, watch)), at.reads) for path, at in projections.items()
    }  # fmt: skip


register_tuner("mole", MoleConfig, MoleModel)
