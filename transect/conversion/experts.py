"""Trained MLPs as groups of neurons: what every conversion reads of them, and puts into a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from ..anatomy import MLP, Anatomy, Block
from ..errors import TransectError
from ..parts import insert
from ..parts.experts import Function, SplitMLP
from .mlp import check_mlps, trained_mlp


@dataclass(frozen=True)
class TrainedMLP:
    """A trained MLP's numbers: up and gate (neurons x d), down (d x neurons), biases or None; see `Function`."""

    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None
    function: str

    @property
    def neurons(self) -> int:
        """How many there are."""
        return len(self.up)

    @property
    def settings(self) -> dict[str, Any]:
        """Of a part that is to hold it."""
        return {
            "hidden": self.neurons, "function": self.function, "gated": self.gate is not None,
            "bias": self.up_bias is not None or self.gate_bias is not None, "out_bias": self.down_bias is not None,
        }  # fmt: skip

    def activations(self, x: Tensor) -> Tensor:
        """What down reads: (n x d) -> (n x neurons)."""
        up, act = functional.linear(x, self.up, self.up_bias), ACT2FN[self.function]
        return act(up) if self.gate is None else act(functional.linear(x, self.gate, self.gate_bias)) * up

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(self.activations(x), self.down, self.down_bias)

    @torch.no_grad()
    def put(self, split: SplitMLP, neurons: Tensor) -> None:
        """Copy these neurons, in this order, into the groups of a part."""
        shape = (split.groups, split.size)
        for held, stored in ((split.up, self.up), (split.gate, self.gate), (split.down, self.down.T)):
            if held is not None and stored is not None:
                held.copy_(stored[neurons].view(*shape, -1))
        for held, stored in ((split.up_bias, self.up_bias), (split.gate_bias, self.gate_bias)):
            if held is not None:
                held.copy_(stored[neurons].view(shape) if stored is not None else torch.zeros_like(held))


@torch.no_grad()
def cuttable_mlp(block: Block) -> TrainedMLP:
    """What a block's MLP has learned, where it lies; TransectError where it is no plain MLP with a named function."""
    check_mlps(block.anatomy, [block.index])
    mlp = trained_mlp(block)
    gate = mlp.gate
    return TrainedMLP(
        mlp.up.weight, mlp.down.weight, None if gate is None else gate.weight, mlp.up.bias,
        None if gate is None else gate.bias, mlp.down.bias, _function_of(mlp, block.index),
    )  # fmt: skip


def _function_of(mlp: MLP, number: int) -> str:
    """The name of the function between the matrices, found by its values; TransectError for one without a name."""
    activation = mlp.activation
    if activation is not None and not any(True for _ in activation.parameters()):
        x = torch.linspace(-6, 6, 97)
        values = activation(x)
        for name in get_args(Function):
            if values.shape == x.shape and torch.allclose(values, ACT2FN[name](x), atol=1e-6, rtol=0):
                return name
    raise TransectError(
        f"the activation of block {number}, {type(activation).__name__ if activation else 'a function without a name'},"
        f" is none of {', '.join(get_args(Function))}: its MLP cannot be cut into experts"
    )


@torch.no_grad()
def put_experts(
    anatomy: Anatomy, number: int, name: str, mlp: TrainedMLP, settings: Mapping[str, Any], seed: int
) -> Any:
    """A part of experts in the place of a block's MLP, still without its neurons; the part."""
    insert(anatomy.model, "mlp", name, layers=[number], settings={**settings, **mlp.settings}, seed=seed)
    part = anatomy.blocks[number].part("mlp")
    if part.out_bias is not None and mlp.down_bias is not None:
        part.out_bias.copy_(mlp.down_bias)
    return part
