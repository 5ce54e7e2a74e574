"""An attention sublayer, by heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TransectError
from .banks import hand_over_banks
from .matrix import Home
from .record import record_of
from .surgery import KEPT_HEADS, SkipAttention, keep_rows_and_columns, set_attribute


class Attention:
    """An attention sublayer: q, k, v and o, by heads. Key/value heads may be shared by groups of query heads."""

    def __init__(self, block: Home) -> None:
        self.block = block
        self.q, self.k, self.v, self.o = (block.matrix(role) for role in ("q", "k", "v", "o"))

    @property
    def head_size(self) -> int:
        """Numbers in one attention head."""
        return self.block.head_size

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.q.shape[0] // self.head_size

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.k.shape[0] // self.head_size

    def _norm(self, path: str | None) -> nn.Module | None:
        if path is None:
            return None
        parent, _, name = path.rpartition(".")
        return getattr(self.block.module.get_submodule(parent), name, None)

    @property
    def q_norm(self) -> nn.Module | None:
        """The norm on queries, where the architecture has one."""
        return self._norm(self.block.anatomy.architecture.q_norm)

    @property
    def k_norm(self) -> nn.Module | None:
        """The norm on keys, where the architecture has one."""
        return self._norm(self.block.anatomy.architecture.k_norm)

    def keep(self, heads: Iterable[int]) -> None:
        """Keep these query heads, in this order (so a permutation is a special case), and the key/value heads they use.

        The heads that share a key/value head must come together, and equally many of each kept group, since the
        model's own code assigns query heads to key/value heads by position.
        """
        heads = [int(head) for head in heads]
        group_size = self.heads // self.key_value_heads
        if not heads:
            raise TransectError("at least one head must be kept; to remove the sublayer use attention.drop()")
        if len(set(heads)) != len(heads) or not all(0 <= head < self.heads for head in heads):
            raise TransectError(f"heads to keep must be distinct numbers from 0 to {self.heads - 1}, got {heads}")
        owners = [head // group_size for head in heads]
        groups = list(dict.fromkeys(owners))
        per_group = len(heads) // len(groups)
        if owners != [group for group in groups for _ in range(per_group)]:
            raise TransectError(
                f"heads {heads} do not form equal groups: heads {group_size}*i to {group_size}*i+{group_size - 1} "
                "share key/value head i; keep equally many heads of each kept group, side by side"
            )
        present_heads = self.heads
        queries, keys = self._rows(heads), self._rows(groups)
        for norm, kept, present in (
            (self.q_norm, queries, self.q.shape[0]),
            (self.k_norm, keys, self.k.shape[0]),
        ):
            weight: Any = getattr(norm, "weight", None)
            if norm is not None and weight is not None and weight.numel() == present != self.head_size:
                # A norm over all heads at once (OLMo-2), or one for each head (Cohere: heads x head size).
                norm.weight = nn.Parameter(weight.detach().flatten()[kept].view(-1, *weight.shape[1:]).clone())
                path = next(name for name, module in self.block.model.named_modules() if module is norm)
                record_of(self.block.model).parameters[path + ".weight"] = list(norm.weight.shape)
        keep_rows_and_columns(self.block, {"q": queries, "k": keys, "v": keys}, {"o": queries})
        self._set_attributes(heads=len(heads), key_value_heads=len(groups))
        self._keep_parameters(heads)
        self._keep_bias(heads, present_heads)

    def _keep_parameters(self, heads: list[int]) -> None:
        """Let the kept heads keep the numbers that the attention module stores for each of them (sinks)."""
        path = f"{self.block.path}.{self.block.anatomy.architecture.attention}"
        for name in self.block.anatomy.architecture.head_parameters:
            owner, _, leaf = f"{path}.{name}".rpartition(".")
            new = nn.Parameter(self.block.model.get_parameter(f"{path}.{name}").detach()[heads].clone())
            setattr(self.block.model.get_submodule(owner), leaf, new)
            record_of(self.block.model).parameters[f"{path}.{name}"] = list(new.shape)

    def _keep_bias(self, heads: list[int], present: int) -> None:
        """Let the kept heads keep what the model adds to their scores by their number (ALiBi)."""
        arguments = self.block.anatomy.architecture.head_bias
        if not arguments:
            return
        path = f"{self.block.path}.{self.block.anatomy.architecture.attention}"
        earlier = getattr(self.block.model.get_submodule(path), KEPT_HEADS, None)
        of, chosen = (present, heads) if earlier is None else (earlier["of"], [earlier["heads"][h] for h in heads])
        if earlier is not None or chosen != list(range(of)):
            value = {"arguments": list(arguments), "of": of, "heads": chosen}
            set_attribute(self.block.model, path, KEPT_HEADS, value)

    def _rows(self, heads: list[int]) -> Tensor:
        return (torch.tensor(heads)[:, None] * self.head_size + torch.arange(self.head_size)).flatten()

    def _set_attributes(self, heads: int, key_value_heads: int) -> None:
        values = {
            "heads": heads,
            "key_value_heads": key_value_heads,
            "heads_per_group": heads // key_value_heads,
            "width": heads * self.head_size,
        }
        path = f"{self.block.path}.{self.block.anatomy.architecture.attention}"
        for attribute, meaning in self.block.anatomy.architecture.attributes.items():
            set_attribute(self.block.model, path, attribute, values[meaning])

    def drop(self) -> None:
        """Remove the sublayer: the block passes its residual stream on unchanged; its cache only counts positions."""
        self.block.refuse_dropping_sublayers()
        path = f"{self.block.path}.{self.block.anatomy.architecture.attention}"
        module: Any = self.block.model.get_submodule(path)
        architecture = self.block.anatomy.architecture
        stand_in = self.o.path.removeprefix(path + ".")
        layer_idx = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        skip = SkipAttention(layer_idx, stand_in, architecture.attention_returns, self.block.attention_adds)
        hand_over_banks(self.block.model, self.block.model.get_submodule(path))
        self.block.model.set_submodule(path, skip)
        record = record_of(self.block.model)
        record.attributes.pop(path, None)
        record.set_module(path, skip.describe())
