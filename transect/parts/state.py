"""Layers of transformers' caches that keep what parts need to go on, in caches that grow and in those of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache

from ..errors import TransectError


class PartLayer(CacheLayerMixin):
    """What a layer of a cache has that a part leads; its tensors of its own have the batch as their first dimension.

    seen: positions that have passed. fixed: for how many the layer in whose place this one stands has room, 0 where it
    would grow. Masks are as wide as they would be for that layer, whatever is kept here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.fixed = 0
        self.is_sliding = False  # whether that layer has a fixed size and keeps the last positions

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all of its tensors."""
        raise NotImplementedError

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """True in a cache of fixed size: by this transformers knows that a single query needs a mask there."""
        return self.fixed > 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first, now = self.first_column, self.seen + query_length
        if first:
            return now - first, first
        return max(self.fixed, now), 0

    @property
    def first_column(self) -> int:
        """Which position the first of a mask's columns is, in a cache of fixed size."""
        return max(self.seen - self.fixed + 1, 0) if self.is_sliding else 0

    def until_now(self, mask: Any, count: int) -> Any:
        """A mask (B x h x N x K) without the columns behind `count` new positions, which one of fixed size may have."""
        if not self.fixed or not isinstance(mask, Tensor) or mask.dim() != 4:
            return mask
        return mask[..., : self.seen + count - self.first_column]

    def get_max_length(self) -> int:
        return self.fixed or -1

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


class StateLayer(PartLayer):
    """The state of one mixer: tensors by name, the batch in their first dimension, and how many positions passed."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TransectError("a layer with a state of its own was asked to keep keys and values: it is another's cache")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        self.state, self.seen = {}, 0


Made = TypeVar("Made", bound=PartLayer)


def layer_of(cache: Cache, index: int, kind: type[Made]) -> Made:
    """The cache's layer of that number as one of that kind; it begins empty.

    Raises TransectError for other caches than the usual ones, and for one that was filled without the part.
    """
    if not isinstance(cache, (DynamicCache, StaticCache)):
        raise TransectError(
            f"a {type(cache).__name__} cannot keep what parts need: generate with the default cache (DynamicCache) or "
            "a static one"
        )
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, kind):
        return layer
    if layer.get_seq_length():
        raise TransectError("this cache was filled before parts were put around the blocks: begin with an empty one")
    made = kind()
    if isinstance(cache, StaticCache):
        made.fixed, made.is_sliding = layer.get_max_length(), layer.is_sliding
    cache.layers[index] = made
    return made
