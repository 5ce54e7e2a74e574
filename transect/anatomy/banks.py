"""Banks: tensors that operators or parts of several layers share. One of them owns each, the others use it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .record import record_of
from .storage import describe


def link_banks(model: nn.Module) -> None:
    """Let everything that shares a bank with others use the one of that which owns it."""
    sharing = [module for module in model.modules() if hasattr(module, "bank_group")]
    owned: dict[str, Any] = {module.bank_group: module.bank for module in sharing if module.owns_bank}  # type: ignore
    for module in sharing:
        if not module.owns_bank and module.bank_group in owned:
            module.use_bank(owned[module.bank_group])  # type: ignore[operator]


def hand_over_banks(model: nn.Module, doomed: nn.Module) -> None:
    """Before `doomed` is removed, give the banks that its operators own to operators that stay."""
    leaving = {id(module): module for module in doomed.modules() if hasattr(module, "bank_group")}
    for owner in leaving.values():
        if not owner.owns_bank:
            continue
        for path, module in model.named_modules():
            if id(module) not in leaving and getattr(module, "bank", None) is owner.bank:
                module.adopt_bank(owner.bank)  # type: ignore[operator]
                recorded = record_of(model)  # the operator itself, or the module of several in which it stands
                host = next((known for known in recorded.modules if f"{path}.".startswith(f"{known}.")), path)
                recorded.set_module(host, describe(model.get_submodule(host)))
                break
