"""The structural changes themselves, on modules; `view` offers them by unit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .matrix import Home
from .record import record_of
from .storage import Stacked, dense, describe, is_dense, read_weight, select


class SkipAttention(nn.Module):
    """Stands for a dropped attention sublayer: adds nothing to the residual stream.

    It still tells the key/value cache how many positions have passed, with keys of width 0, because transformers
    reads the sequence length off the first layer of the cache, whichever sublayers are left.
    """

    def __init__(self, layer_idx: int | None, stand_in: str) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.stand_in = stand_in
        # An empty tensor under the name of a matrix that is gone: see Stacked.
        *parents, name = stand_in.split(".")
        holder: nn.Module = self
        for part in [*parents, name]:
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.register_buffer("weight", torch.empty(0))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 0)
            cache.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden), None

    def describe(self) -> dict[str, Any]:
        return {"kind": "skip_attention", "layer_idx": self.layer_idx, "stand_in": self.stand_in}


def keep_rows_and_columns(block: Home, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> None:
    """Restrict a block's matrices to some rows and columns, by role; fused ones are cut as a whole and stay fused."""
    record = record_of(block.model)
    done: set[str] = set()
    for role in (*rows, *columns):
        matrix = block.find(role)
        if matrix.path in done:
            continue
        done.add(matrix.path)
        host = matrix.host
        if matrix.fused is None:
            new = select(host, rows.get(role), columns.get(role))
            block.model.set_submodule(matrix.path, new)
        elif isinstance(host, Stacked):
            for part in matrix.fused.parts:
                host.parts[part] = select(host.parts[part], rows.get(part))
            new = host
        else:
            new = _select_fused(block, matrix.path, matrix.fused, rows)
            block.model.set_submodule(matrix.path, new)
        record.set_module(matrix.path, describe(new))


def _select_fused(block: Home, path: str, fused: Any, rows: dict[str, Tensor]) -> nn.Module:
    host = block.model.get_submodule(path)
    assert is_dense(host)
    positions = torch.arange(read_weight(host).shape[0])
    chosen = [positions[block.find(part).rows()][rows[part]] for part in fused.parts]
    if fused.interleaved:  # (heads, head_size) of each part -> heads, parts, head_size
        order = torch.stack([part.view(-1, block.head_size) for part in chosen], dim=1).flatten()
    else:
        order = torch.cat(chosen)
    bias: Any = host.bias
    return dense(read_weight(host)[order], None if bias is None else bias[order], isinstance(host, Conv1D)).train(
        host.training
    )


def set_attribute(model: nn.Module, path: str, attribute: str, value: Any) -> None:
    """Set an attribute of the module at `path` and record it. `config.x` goes to a private copy of its config."""
    *parents, name = attribute.split(".")
    owner: Any = model.get_submodule(path)
    for parent in parents:
        if parent == "config":
            owner.config = copy.copy(owner.config)
        owner = getattr(owner, parent)
    if getattr(owner, name) == value:
        return
    setattr(owner, name, value)
    record_of(model).attributes.setdefault(path, {})[attribute] = value
