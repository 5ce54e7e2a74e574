"""The first tokens of a sequence kept as their keys and values, so that the blocks run on the tokens behind alone.

For many runs that differ in late tokens only: a causal model computes the same for every token in front of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .objective import Batch, inputs_of


class _Kept(DynamicLayer):
    """Keys and values (B x heads x positions x d_h) that stay as they are, whatever is computed behind them.

    They are read by B rows, or by any number of copies of these.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and all values, those of the new positions last."""
        assert self.keys is not None and self.values is not None
        copies = len(key_states) // len(self.keys)
        keys, values = (kept.repeat(copies, 1, 1, 1) for kept in (self.keys, self.values))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def run_and_keep(model: Any, batch: Batch) -> Any:
    """One pass of the user's own model without its head, and the cache that it filled; None where it has none."""
    inputs = inputs_of(model, batch, body=True)
    if "use_cache" not in inputs:
        model.base_model(**inputs)
        return None
    output = model.base_model(**{**inputs, "use_cache": True})
    return getattr(output, "past_key_values", None)


def first_of(cache: Any, count: int | Tensor, length: int) -> Cache | None:
    """The first `count` positions of what a pass over `length` positions has left, to be run behind.

    count: of all rows, or of each (B), which then end at the same place, with zeros in front of the shorter ones.
    None where a layer keeps anything but keys and values of every position: recurrent states, a shorter window.
    """
    layers = getattr(cache, "layers", [])
    kept = [layer for layer in layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
    if not layers or len(kept) < len(layers):
        return None
    held: list[tuple[Any, Any]] = [(layer.keys, layer.values) for layer in kept]
    if any(keys.dim() != 4 or keys.shape[-2] != length for keys, _ in held):
        return None

    def first(states: Tensor) -> Tensor:
        if isinstance(count, int):
            return states[..., :count, :]
        places = torch.arange(int(count.max()), device=count.device) - (count.max() - count)[:, None]  # B x positions
        chosen = states.take_along_dim(places.clamp_min(0)[:, None, :, None], 2)
        return chosen * (places >= 0)[:, None, :, None]

    return Cache(layers=[_Kept(first(keys), first(values)) for keys, values in held])


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether states computed behind a cache are those of whole sequences, but for rounding."""
    return float((found - expected).norm()) <= torch.finfo(found.dtype).eps ** 0.5 * float(expected.norm())
