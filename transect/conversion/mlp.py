"""Trained MLPs as two or three matrices and a function, whatever the architecture stores them as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..anatomy import MLP, Anatomy, Block
from ..anatomy.storage import is_dense
from ..errors import TransectError
from ..forward import at_rest
from ..parts.insert import places
from .attention import TOLERANCE


def trained_mlp(block: Block) -> MLP:
    """The block's MLP; TransectError where none stands as the model has it, with plain matrices and a function."""
    mlp = block.mlp
    if not isinstance(mlp, MLP):
        raise TransectError(
            f"block {block.index} has no MLP of the model's own (a part stands there, or experts, or it was dropped): "
            "convert the model that it came from"
        )
    for matrix in (mlp.up, mlp.down, *(() if mlp.gate is None else (mlp.gate,))):
        if not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}: convert first, and compress what comes out"
            )
    if mlp.activation is None:
        raise TransectError(f"the description of {block.anatomy.architecture.name} names no activation")
    return mlp


@torch.no_grad()
def check_mlps(anatomy: Anatomy, layers: Sequence[int]) -> None:
    """TransectError unless the MLPs of these blocks are down(f(up x)) or down(f(gate x) * up x). It is tried."""
    name = anatomy.architecture.name
    for number in layers:
        block = anatomy.blocks[number]
        (path,) = places(anatomy, "mlp", number)
        mlp = trained_mlp(block)
        module: Any = anatomy.model.get_submodule(path)
        weight = mlp.up.weight
        x = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        function: Any = mlp.activation
        with at_rest(anatomy.model):
            up = functional.linear(x, weight, mlp.up.bias)
            gate = None if mlp.gate is None else functional.linear(x, mlp.gate.weight, mlp.gate.bias)
            hidden = function(up) if gate is None else function(gate) * up
            ours = functional.linear(hidden, mlp.down.weight, mlp.down.bias)
            theirs = module(x)
        off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not off < max(TOLERANCE, 16 * torch.finfo(x.dtype).eps):
            raise TransectError(f"the MLP of block {number} of {name} is more than its matrices and a function")


@torch.no_grad()
def fill(linear: nn.Linear, matrix: Any) -> None:
    """Give a part's matrix the trained numbers; a bias that the model does not have is 0."""
    linear.weight.copy_(matrix.weight)
    if linear.bias is not None:
        linear.bias.copy_(torch.zeros_like(linear.bias) if matrix.bias is None else matrix.bias)
