"""A layer of transformers' cache that keeps whatever a mixer needs to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..errors import TransectError


class BatchFirst:
    """What a layer of a cache must do to tensors of its own whose first dimension is the batch; `seen`: positions."""

    is_sliding = False
    seen: int

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all of its tensors."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise TransectError(
                "what a part has kept of a text cannot be taken back: generate without assistance by another model"
            )


class StateLayer(BatchFirst, CacheLayerMixin):
    """The state of one mixer: tensors by name, the batch in their first dimension, and how many positions passed."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TransectError("a layer with a state of its own was asked to keep keys and values: it is another's cache")

    def get_max_length(self) -> int:
        return -1

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        self.state, self.seen = {}, 0


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The cache's layer of that number as one that keeps a mixer's state; it begins empty.

    Raises TransectError for a cache of fixed size, whose masks are made for keys and values.
    """
    if not isinstance(cache, DynamicCache):
        raise TransectError(
            f"a {type(cache).__name__} cannot keep a mixer's state: generate with the default cache (a DynamicCache)"
        )
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if not isinstance(layer, StateLayer):
        cache.layers[index] = layer = StateLayer()
    return layer
