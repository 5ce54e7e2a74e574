"""A model at rest: nothing random in a forward pass, and everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


@contextmanager
def at_rest(*models: Any, frozen: bool = False) -> Iterator[None]:
    """Inside the `with` the models are in evaluation mode: no dropout. Whatever measures or calibrates runs in it.

    frozen: no parameter asks for gradients either.
    Afterwards, also after an error, every module is in the mode in which it was, one by one, and every parameter asks
    for gradients as before. A module that was put in meanwhile takes the mode of the module around it. torch's own
    random numbers go on as if nothing had been drawn. May be nested.
    """
    modes = [_modes_of(model) for model in models]
    gradients = [(p, p.requires_grad) for model in models for p in model.parameters()] if frozen else []
    every = (p for model in models for p in model.parameters()) if torch.accelerator.is_available() else ()
    devices = {p.device for p in every if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind):
        try:
            for model, mode in zip(models, modes, strict=True):
                if mode is not None:
                    model.eval()
                if frozen:
                    model.requires_grad_(False)
            yield
        finally:
            for model, mode in zip(models, modes, strict=True):
                if mode is not None:
                    _restore(model, mode, model.training)
                elif any(module.training for module in model.modules()):
                    model.eval()
            for parameter, flag in gradients:
                parameter.requires_grad_(flag)


def _modes_of(model: nn.Module) -> WeakKeyDictionary[nn.Module, bool] | None:
    """The mode of every module; None where all are in evaluation mode, as they mostly are.

    By weak references: a matrix that is replaced meanwhile must not be kept in memory.
    """
    modules = list(model.modules())
    if not any(module.training for module in modules):
        return None
    return WeakKeyDictionary((module, module.training) for module in modules)


def _restore(module: nn.Module, modes: WeakKeyDictionary[nn.Module, bool], around: bool) -> None:
    """Put a module and those inside it back in their modes. around: that of the module around it."""
    mode = modes.get(module, around)
    if module.training != mode:
        module.train(mode)  # not the flag alone: an operator may keep something that goes with it
    for child in module.children():
        _restore(child, modes, mode)
