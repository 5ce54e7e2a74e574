"""Which numbers of a model a repair changes, and the model set up for that."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adaptation.targets import linear_layers
from ..anatomy import Anatomy
from ..errors import TransectError
from ..operators import Operator
from ..training import Parameters
from .settings import Settings


def changed_parameters(anatomy: Anatomy, settings: Settings) -> Parameters:
    """By name within the block list, the stored numbers of the blocks that the repair may change.

    "full": all of them, norms and biases included. "lora": the weight of every linear layer, the factors of low-rank
    layers among them, and what a structured operator holds otherwise (the values of a sparse matrix, a dictionary,
    diagonal blocks). peft has no adapter for the latter, and it is small, so it is trained itself (our choice).
    Numbers that several blocks share are left alone block by block, since a later block would undo an earlier one.
    """
    blocks = anatomy.block_list
    named = {name: p for name, p in blocks.named_parameters() if p.is_floating_point() and p.numel()}
    if settings.train == "lora":
        linear = set(linear_layers(blocks))
        direct = _held_directly(blocks)
        named = {k: p for k, p in named.items() if k.removesuffix(".weight") in linear or id(p) in direct}
    if settings.how == "blocks":
        users = _users(anatomy)
        named = {name: p for name, p in named.items() if users[id(p)] == 1}
    if not named:
        raise TransectError(f"the model's blocks hold nothing that train={settings.train!r} can change")
    return named


def _held_directly(blocks: nn.Module) -> set[int]:
    """Ids of the parameters that structured operators hold outside any linear layer, biases left out."""
    operators = [module for module in blocks.modules() if isinstance(module, Operator)]
    linear = {id(p) for m in blocks.modules() if isinstance(m, (nn.Linear, Conv1D)) for p in m.parameters()}
    return {id(p) for op in operators for p in op.parameters() if p is not op.bias} - linear


def _users(anatomy: Anatomy) -> Counter[int]:
    """How many blocks use each parameter, by its id; a bank that blocks share counts in each of them."""
    users: Counter[int] = Counter()
    for block in anatomy.block_list:
        banks: list[Any] = [module.bank for module in block.modules() if hasattr(module, "bank_group")]
        used = [*block.parameters(), *(bank.weight for bank in banks if bank is not None)]
        users.update({id(parameter) for parameter in used})
    return users


@contextmanager
def trainable(host: nn.Module, changed: Parameters, settings: Settings) -> Iterator[Parameters]:
    """Inside the `with`, the parameters of `host` to optimise: those changed, or low-rank updates in their place.

    host: the block list, or one of its blocks. changed: its parameters that may change, by name within `host`.
    At the end the updates are merged into the weights, and the modules are again those that there were.
    """
    if settings.train == "full":
        yield _requiring(changed)
        return
    linear = {path for path in linear_layers(host) if f"{path}.weight" in changed}
    direct = {name: p for name, p in changed.items() if name.removesuffix(".weight") not in linear}
    adapters = add_adapters(host, sorted(linear), settings) if linear else {}
    try:
        yield adapters | _requiring(direct)
    finally:
        merge_adapters(host)


def _requiring(parameters: Parameters) -> Parameters:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def check_peft() -> None:
    """TransectError unless peft is installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise TransectError(
            "LoRA needs the package peft, which is not installed: pip install 'transect[recover]', or train the "
            "weights themselves (full)"
        ) from None


def add_adapters(host: nn.Module, paths: list[str], settings: Settings) -> Parameters:
    """LoRA beside the linear layers at these paths, through peft; the updates' factors by name."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=paths,  # type: ignore
    )  # fmt: skip
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft finds out by itself which way Conv1D lies
        inject_adapter_in_model(config, host)
    return {name: parameter for name, parameter in host.named_parameters() if parameter.requires_grad}


def merge_adapters(host: nn.Module) -> None:
    """Add every update to its layer's weight and put the layer itself back."""
    adapted: list[tuple[str, Any]] = [(path, m) for path, m in host.named_modules() if hasattr(m, "lora_dropout")]
    with torch.no_grad():
        for path, layer in adapted:
            layer.get_base_layer().weight.add_(layer.get_delta_weight("default"))
            host.set_submodule(path, layer.get_base_layer())
    host.__dict__.pop("peft_config", None)


def training_mode(host: nn.Module) -> None:
    """LoRA's dropout on, the model's own off: a short repair needs no noise that distillation could not explain."""
    host.eval()
    for module in host.modules():
        if isinstance(module, Operator) or hasattr(module, "lora_dropout"):
            module.train()
