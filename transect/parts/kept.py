"""Running a block on some positions of each sequence, and the cache of a block that is run so.

What is left out is not computed and not cached: positions that are kept are gathered, with their own position ids,
rotary angles and rows of the mask; later positions see what was kept, and nothing else. Sequences may keep different
numbers of positions, also none: each comes out as it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..errors import TransectError
from .state import PartLayer


class KeptLayer(PartLayer, DynamicLayer):
    """Keys and values of the positions that a block was run on, and the state of the part around it.

    keys, values: (B x h x S x D), each sequence's own from the front; S is the most that one of them has. places:
    (B x S), where in the sequence each of them stood, -1 behind the last. seen: also of positions that were not kept;
    it is what transformers takes for the length. state: tensors by name, the batch first. In a cache of fixed size,
    too, it keeps no more than this, and grows.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.places: Tensor | None = None
        self._all = False
        self._rows = self._real = self._into = None

    def expect_all(self, kept: Tensor) -> None:
        """Prepare for the keys of every position of this call; kept: (B x N), all true."""
        new = torch.arange(self.seen, self.seen + kept.shape[1], device=kept.device).expand_as(kept)
        self.places = new if self.places is None else torch.cat([self.places, new], dim=1)
        self._all = True

    def expect(self, rows: Tensor, index: Tensor, real: Tensor, batch: int) -> Tensor:
        """Prepare for the keys of some sequences; the places (R x S) of all keys that these then have.

        rows: (R) numbers of the sequences. index: (R x M) the positions in this call. real: (R x M), false where a
        sequence has fewer than M.
        """
        if self.places is None:
            self.places = index.new_zeros(batch, 0)
        had = (self.places >= 0).sum(1)[rows]  # R
        size = max(self.places.shape[1], int((had + real.sum(1)).max()))
        self.places = _wider(self.places, 1, size, -1)
        row, at = real.nonzero(as_tuple=True)
        into = had[row] + at  # kept ones are at the front of `index`
        self.places = self.places.index_put((rows[row], into), index[row, at] + self.seen)
        self._all, self._rows, self._real, self._into = False, rows, (row, at), into
        return self.places[rows]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values (R x h x M x D) of what was expected; all of these sequences (R x h x S x D)."""
        if self._all:
            self._all = False
            return super().update(key_states, value_states, *args, **kwargs)
        if self.places is None or self._rows is None or self._real is None:
            raise TransectError("this cache was filled by a block that a part leads, and is now read without the part")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = key_states.new_zeros(len(self.places), key_states.shape[1], 0, key_states.shape[3])
            self.values = value_states.new_zeros(len(self.places), value_states.shape[1], 0, value_states.shape[3])
        row, at = self._real
        every = len(self._rows) == len(self.places)
        for name, new in (("keys", key_states), ("values", value_states)):
            kept = _wider(getattr(self, name), 2, self.places.shape[1], 0)
            kept = kept.transpose(1, 2).index_put((self._rows[row], self._into), new.transpose(1, 2)[row, at])
            setattr(self, name, kept.transpose(1, 2))
        if every:
            return self.keys, self.values  # type: ignore[return-value]
        return self.keys[self._rows], self.values[self._rows]  # type: ignore[index]

    def forget(self, rows: Tensor) -> None:
        """Drop the keys and values of the sequences where `rows` (B) is true."""
        if self.places is None or not bool(rows.any()):
            return
        self.places = self.places.masked_fill(rows[:, None], -1)
        size = int((self.places >= 0).sum(1).max())
        self.places = self.places[:, :size]
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :size].clone(), self.values[:, :, :size].clone()  # type: ignore

    @property
    def even(self) -> bool:
        """Whether every sequence has kept as many positions as the others."""
        places = self.places
        if places is None:
            return self.seen == 0
        # A sequence's places are filled from the front.
        return places.shape[1] == 0 or bool((places[:, -1] >= 0).all())

    @property
    def held(self) -> int:
        """How many positions a sequence has kept, at most."""
        return 0 if self.places is None else self.places.shape[1]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: change(tensor) for name, tensor in self.state.items()}
        if self.places is not None:
            self.places = change(self.places)
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)  # type: ignore[arg-type]

    def reset(self) -> None:
        self.state, self.seen, self.places, self._all, self._rows = {}, 0, None, False, None
        super().reset()


def _wider(tensor: Tensor, dimension: int, size: int, fill: int) -> Tensor:
    """With as many entries in a dimension as wanted, the new ones at its end."""
    missing = size - tensor.shape[dimension]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=dimension)


def run_kept(
    block: Callable[..., Tensor],
    given: Mapping[str, Any],
    x: Tensor,
    kept: Tensor,
    layer: KeptLayer | None,
    gain: Tensor | None = None,
    adds: nn.Module | None = None,
) -> Tensor:
    """Run a block on the positions where `kept` (B x N) is true; the stream (B x N x d), elsewhere what came in.

    block: called with a stream and its other arguments, `given`. layer: of the cache, None where nothing is
    cached. gain: (B x N), by which the output of the module `adds` in the block is multiplied.
    """
    batch, count = kept.shape
    past, held, even = (0, 0, True) if layer is None else (layer.seen, layer.held, layer.even)
    mask = given.get("attention_mask")
    # The mask of a window may be shorter than what is kept.
    full = held == past and (mask is None or (isinstance(mask, Tensor) and mask.shape[-1] == past + count))
    if even and (full or layer is not None) and bool(kept.all()):  # nothing to gather, and keys of one length
        chosen = dict(given)
        if layer is not None:
            layer.expect_all(kept)
        if layer is not None and not full and not (mask is None and count == 1):  # one token sees all that was kept
            rows, index = torch.arange(batch, device=x.device), torch.arange(count, device=x.device).expand(batch, -1)
            assert layer.places is not None
            chosen["attention_mask"] = mask_among(mask, rows, index, kept, layer.places, past, (batch, count))
        with _multiplied(adds, gain):
            return block(x, **chosen)
    rows = kept.any(1).nonzero()[:, 0]  # R
    if not len(rows):
        return x
    first, index = kept[rows].int().sort(dim=1, descending=True, stable=True)  # the kept ones first, in their order
    most = int(first.sum(1).max())
    real, index = first[:, :most].bool(), index[:, :most]  # R x M
    places = (index + past).masked_fill(~real, -1) if layer is None else layer.expect(rows, index, real, batch)
    at = rows[:, None], index
    chosen = dict(given)
    for name in ("position_ids", "position_embeddings"):
        if chosen.get(name) is not None:
            chosen[name] = _at_positions(chosen[name], at, batch)
    chosen["attention_mask"] = mask_among(mask, rows, index, real, places, past, (batch, count))
    with _multiplied(adds, None if gain is None else gain[at]):
        y = block(x[at], **chosen)
    row, here = real.nonzero(as_tuple=True)
    return x.index_put((rows[row], index[row, here]), y[row, here].to(x.dtype))


@contextmanager
def _multiplied(module: nn.Module | None, gain: Tensor | None) -> Iterator[None]:
    """Inside the `with` what the module gives is multiplied position by position."""
    if gain is None:
        yield
        return
    if module is None:
        raise TransectError("this block has no single module for its MLP, whose output a part could multiply")

    def multiplied(_: nn.Module, __: Any, out: Any) -> Tensor:
        return out * gain.reshape(*out.shape[:-1], 1).to(out.dtype)

    hook = module.register_forward_hook(multiplied)
    try:
        yield
    finally:
        hook.remove()


def _at_positions(tensor: Any, at: tuple[Tensor, Tensor], batch: int) -> Any:
    """Of a tensor (1 or B x N x ...), or several, what belongs to the positions (R x M x ...)."""
    if isinstance(tensor, (tuple, list)):
        return tuple(_at_positions(one, at, batch) for one in tensor)
    return tensor.expand(batch, *tensor.shape[1:])[at]


def mask_among(
    mask: Tensor | None, rows: Tensor, index: Tensor, real: Tensor, places: Tensor, past: int, shape: tuple[int, int]
) -> Tensor:
    """What the kept positions may see of the kept keys (R x h x M x S), as a mask of the kind that came.

    mask: of all positions (B x h x N x K), true or near zero where one may see another; None if each sees all up to
    itself. rows, index, real: see `run_kept`. places: (R x S) of the keys in the sequence, -1 where there is none.
    past: positions before this call. shape: B and N of the call.
    """
    batch, count = shape
    there = (places >= 0)[:, None, None]  # R x 1 x 1 x S
    if mask is None:
        seen = there & (places[:, None, None] <= (index + past)[:, None, :, None])
        return seen | ~real[:, None, :, None]  # a filler sees anything: it goes nowhere
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TransectError(
            f"a mask of type {type(mask).__name__} cannot be read by a part that routes: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    columns = places - (past + count - mask.shape[-1])  # a window's mask does not begin at the sequence's first
    there = there & (columns >= 0)[:, None, None]
    mask = mask.expand(batch, *mask.shape[1:])[rows]
    heads, width = mask.shape[1], mask.shape[3]
    mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))
    mask = mask.gather(3, columns.clamp_min(0)[:, None, None].expand(-1, heads, mask.shape[2], -1))
    filler = ~real[:, None, :, None]
    if mask.dtype == torch.bool:
        return (mask & there) | filler
    return mask.masked_fill(~there, torch.finfo(mask.dtype).min).masked_fill(filler, 0)
