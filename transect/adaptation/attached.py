"""A model on which something is trained: an adapter, all of its numbers, or other numbers in its matrices' places."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import TransectError
from ..forward.objective import task_of
from ..training import Parameters, Parametrization, Parametrized
from ..training.parametrizations.host import dense_matrices
from .settings import Settings
from .targets import targets_of

_TASKS = {"causal": "CAUSAL_LM", "classification": "SEQ_CLS"}  # as PEFT calls them


class Attached:
    """A model of which some numbers are trained: those of a PEFT adapter, or, without a config, all of its own.

    model: the Hugging Face model, whose layers are wrapped in place until `merge` or `detach`. seed: of what the
    adapter draws at its start. rewritten: paths of layers whose weights it changes at once; a copy of them is kept.
    Raises TransectError if the adapter does not go with the model, which is then as it was.
    """

    def __init__(self, model: Any, config: PeftConfig | None, seed: int, rewritten: Iterable[str] = ()) -> None:
        self.base, self.peft, self.held_out = model, None, None
        if config is None:
            return
        weights = {path: model.get_submodule(path).weight for path in rewritten}
        self._dense = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights.values()]
        config.task_type = _TASKS.get(task_of(model))  # type: ignore[assignment]
        try:
            with warnings.catch_warnings(), torch.random.fork_rng():
                torch.manual_seed(seed)
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT finds out which way Conv1D lies
                warnings.filterwarnings(
                    "ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning
                )  # PEFT asks
                self.peft = get_peft_model(model, config)
        except TransectError:
            raise
        except (ValueError, TypeError) as reason:
            raise TransectError(f"this adapter does not go with the model: {reason}") from reason
        self._trained = {name for name, p in self.peft.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> Parameters:
        """What is trained, by name; for a full training this asks every number for a gradient."""
        if self.peft is None:
            found = {name: p for name, p in self.base.named_parameters() if p.is_floating_point() and p.numel()}
            for parameter in found.values():
                parameter.requires_grad_(True)
            return found
        return {name: p for name, p in self.base.named_parameters() if p.requires_grad}

    def freeze_the_rest(self) -> None:
        """Leave the adapter alone to be trained, as PEFT has it."""
        if self.peft is not None:
            for name, parameter in self.peft.named_parameters():
                parameter.requires_grad_(name in self._trained)

    @property
    def layers(self) -> dict[str, BaseTunerLayer]:
        """The wrapped layers by path."""
        return {path: layer for path, layer in self.base.named_modules() if isinstance(layer, BaseTunerLayer)}

    def penalty(self, again: Callable[[], Tensor] | None = None) -> Tensor | None:
        """What the adapter itself adds to the mean loss of the batch that has just run; see a tuner's `penalty_of`.

        again: not used; see `Parametrized`.
        """
        kinds: dict[type, Any] = {type(layer): layer for layer in self.layers.values()}
        terms = [kind.penalty_of(self.base, "default") for kind in kinds if hasattr(kind, "penalty_of")]
        found = [term for term in terms if term is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Let the layers that change what they train do so. step: how many of the steps are done, 0 at the start."""
        for layer in self.layers.values() if step else ():
            if (act := getattr(layer, "after_step", None)) is not None:
                act(step, optimizer)

    def told(self) -> dict[str, float]:
        """Nothing; see `Parametrized`."""
        return {}

    def held(self) -> dict[str, Tensor]:
        """Buffers of the adapter: what its numbers stand for."""
        return {
            f"{path}.{name}": buffer
            for path, layer in self.layers.items()
            for name, buffer in _module(layer).named_buffers()
            if not name.startswith("base_layer.")
        }

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Buffers as `held` once gave them, of whatever size they were then."""
        for full, tensor in tensors.items():
            path, _, name = full.rpartition(".")
            buffers = self.base.get_submodule(path)._buffers
            buffers[name] = tensor.to(buffers[name].device, copy=True)

    def finish(self, measure: Callable[[], float] | None = None) -> None:
        """Nothing: the adapter stays."""

    def merge(self) -> Any:
        """Write the adapter into the weights, and put the layers back; the model."""
        if self.peft is None:
            return self.base
        merged = self.peft.merge_and_unload()  # type: ignore[operator]
        self.peft = None
        return merged

    def detach(self) -> None:
        """Take the adapter away, and make the model what it was."""
        if self.peft is not None:
            self.peft.unload()  # type: ignore[operator]
            self.peft = None
            with torch.no_grad():
                for weight, dense in self._dense:
                    weight.copy_(dense)

    @property
    def result(self) -> PeftModel | Any:
        """What a user goes on with: the model with its adapter, as PEFT has it, or the model itself."""
        return self.base if self.peft is None else self.peft


class Replaced(Parametrized):
    """The same for a parametrization, whose `finish` leaves an ordinary model, with structured matrices perhaps."""

    peft = None

    def freeze_the_rest(self) -> None:
        """Nothing: there is no adapter."""

    def merge(self) -> Any:
        """The model, which `finish` has put together."""
        return self.base

    @property
    def result(self) -> Any:
        """What a user goes on with."""
        return self.base


def prepared(anatomy: Anatomy, settings: Settings) -> Callable[[], Attached | Replaced]:
    """What attaches the way of training that the settings name, after checking that it goes with the model.

    TransectError, before any change, where it does not.
    """
    way, model = settings.way, anatomy.model
    if isinstance(way, Parametrization):
        dense_matrices(anatomy, settings.roles, way.name)
        return lambda: Replaced(anatomy, way, settings.options, settings.roles, settings.seed)
    targets = targets_of(anatomy, settings.roles)
    way.check(targets, settings.options)
    way.check_kinds({path: model.get_submodule(path) for path in targets})
    config = way.config(list(targets), settings.options)
    return lambda: Attached(model, config, settings.seed, targets if way.rewrites else ())


def _module(layer: Any) -> nn.Module:
    return layer
