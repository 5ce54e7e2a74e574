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


def argument(known: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a call, by its name and its position."""
    name, position = known
    return kwargs[name] if name in kwargs else args[position]


class SkipAttention(nn.Module):
    """Stands for a dropped attention sublayer: adds nothing to the residual stream.

    It still tells the key/value cache how many positions have passed, with one key of width 1 for each, because
    transformers reads the sequence length off the first layer of the cache, whichever sublayers are left, and takes
    keys without numbers for no keys.

    stand_in: path of the output matrix within the attention module. returns: how many values the attention's forward
    returned (`Architecture.attention_returns`). adds: name and position of the argument that it added to its output
    itself (`Architecture.attention_adds`), or None.
    """

    def __init__(
        self, layer_idx: int | None, stand_in: str, returns: int = 2, adds: tuple[str, int] | None = None
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.stand_in = stand_in
        self.returns = returns
        self.adds = adds
        # An empty tensor under the name of a matrix that is gone: see Stacked.
        *parents, name = stand_in.split(".")
        holder: nn.Module = self
        for part in [*parents, name]:
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.register_buffer("weight", torch.empty(0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            counter = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(counter, counter, self.layer_idx)
        output = torch.zeros_like(hidden) if self.adds is None else argument(self.adds, args, kwargs)
        return (output, *[None] * (self.returns - 1)) if self.returns else output

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "skip_attention", "layer_idx": self.layer_idx, "stand_in": self.stand_in, "returns": self.returns,
            "adds": None if self.adds is None else list(self.adds),
        }  # fmt: skip


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
    if fused.interleaved:  # a key/value head's queries, its key and its value lie together
        groups = min(map(len, chosen)) // block.head_size
        order = torch.cat([part.view(groups, -1) for part in chosen], dim=1).flatten()
    else:
        order = torch.cat(chosen)
    bias: Any = host.bias
    return dense(read_weight(host)[order], None if bias is None else bias[order], isinstance(host, Conv1D)).train(
        host.training
    )


def set_attribute(model: nn.Module, path: str, attribute: str, value: Any) -> None:
    """Set an attribute of the module at `path` and record it. `config.x` goes to a private copy of its config."""
    module: Any = model.get_submodule(path)
    present = module
    for name in attribute.split("."):
        present = getattr(present, name, None) if attribute == KEPT_HEADS else getattr(present, name)
    if present == value:
        return
    assign(module, attribute, value)
    record_of(model).attributes.setdefault(path, {})[attribute] = value


KEPT_HEADS = "kept_heads"  # an attribute of our own on an attention module: see `_select_head_bias`


def assign(module: Any, attribute: str, value: Any) -> None:
    """Set an attribute of a module; `config.x` goes to a private copy of the module's config.

    ValueError for anything but a size: a whole number in the place of one that the module itself, one inside it, or
    its config holds, from 1 to that or to the largest side of a matrix in it; or the heads that are kept, whole.
    """
    *parents, name = attribute.split(".")
    if attribute == KEPT_HEADS:
        _check_kept_heads(value)
        if not hasattr(module, KEPT_HEADS):
            module.register_forward_pre_hook(_select_head_bias, with_kwargs=True)
        setattr(module, name, value)
        return
    owner: Any = module
    for parent in parents:
        owner = _inside(owner, parent)
    kept = vars(owner).get(getattr(owner, "attribute_map", {}).get(name, name)) if owner is not None else None
    if not name.isidentifier() or name.startswith("_") or type(kept) is not int:
        raise ValueError(f"{attribute!r} is no size that a {type(module).__name__} has")
    most = max([kept, *(size for parameter in module.parameters() for size in parameter.shape)])
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{attribute!r} should be a whole number from 1 to {most}, not {value!r}")
    if "config" in parents:
        owner = module
        for parent in parents:
            if parent == "config":
                owner.config = copy.copy(owner.config)
            owner = getattr(owner, parent)
    setattr(owner, name, value)


def _inside(owner: Any, name: str) -> Any:
    """The config of a module, or the module in it that has this name; None where there is none."""
    if name == "config" and "config" in getattr(owner, "__dict__", {}):
        return owner.config
    return getattr(owner, "_modules", {}).get(name)


def _check_kept_heads(value: Any) -> None:
    """ValueError unless it is what `_select_head_bias` reads."""
    if not isinstance(value, dict) or set(value) != {"arguments", "of", "heads"}:
        raise ValueError(f"{KEPT_HEADS!r} should hold arguments, of and heads")
    arguments, of, heads = value["arguments"], value["of"], value["heads"]
    if not isinstance(arguments, list) or not all(isinstance(name, str) and name.isidentifier() for name in arguments):
        raise ValueError(f"the arguments of {KEPT_HEADS!r} should be names")
    whole = isinstance(heads, list) and all(type(head) is int for head in [of, *heads])
    if not whole or not heads or len(set(heads)) != len(heads) or not all(0 <= head < of for head in heads):
        raise ValueError(f"the heads of {KEPT_HEADS!r} should be distinct numbers below a whole number `of`")


def _select_head_bias(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of arguments that hold a slice for each head (ALiBi), give the attention those of the heads that it still has.

    The heads are the third dimension from the end, alone or behind the batch's; a mask for all heads alike has 1 there.
    """
    kept = module.kept_heads
    chosen = dict(kwargs)
    for name in kept["arguments"]:
        bias = kwargs.get(name)
        if isinstance(bias, Tensor) and bias.shape[-3] % kept["of"] == 0:
            heads = bias.unflatten(-3, (-1, kept["of"]))
            chosen[name] = heads[..., kept["heads"], :, :].flatten(-4, -3)
    return args, chosen
