"""Activations of running text as shuffled batches of vectors, of which a bounded number is in memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..data import Batches
from ..data.batches import stacked
from ..errors import BadData, TransectError
from ..forward import Point, at_rest, run_body, to_device, watch
from ..forward.blocks import stopping_behind
from ..forward.points import place


def counted(batch: Mapping[str, Tensor], first: bool) -> Tensor:
    """Which positions (B x T) are taken: no padding, and a sequence's first token only if that is asked for."""
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return real if first else real & (real.long().cumsum(1) > 1)


class Activations(Sequence[Tensor]):
    """Batches (batch x D) of a point's activations, in float32 or wider, on the model's device.

    A text's sequences come in a random order, a new one in every round; their tokens are cut into buffers and mixed
    within each. The model runs once for a buffer, no further than the layer; a text that fits into one buffer is run
    once. Every batch follows from its number alone, so that a training can be resumed at any. (The authors refill half
    of a buffer at a time. Here a buffer is filled as a whole, with whole sequences from all over the text.)

    count: number of batches. Raises BadData where the text has no token to take, and TransectError for a point that the
    model does not have, and for activations that are not finite.
    """

    def __init__(
        self, anatomy: Anatomy, data: Batches, point: Point, layer: int, *, count: int, batch: int, buffer: int,
        first: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        where = place(anatomy, point, layer)
        if where is None:
            raise TransectError(f"the model has no {point} {layer}: that sublayer was dropped, or is of another kind")
        if any("input_ids" not in row for row in data):
            raise BadData("a dictionary is trained on text, and this data has no token ids")
        self.anatomy, self.layer = anatomy, layer
        self.point: Point = point
        self.total, self.batch, self.first, self.seed = count, batch, first, seed
        self.rows = [
            {name: tensor[i] for name, tensor in one.items() if name in ("input_ids", "attention_mask", "position_ids")}
            for one in data for i in range(len(one["input_ids"]))
        ]  # fmt: skip
        self.together = max((len(one["input_ids"]) for one in data), default=1)  # sequences that the model runs at once
        self.lengths = torch.tensor([int(counted(_one(row), first).sum()) for row in self.rows], dtype=torch.long)
        self.tokens = int(self.lengths.sum())
        if not self.tokens:
            raise BadData(
                "the text has no token to train a dictionary on: the first token of a sequence is left out "
                "(first=True takes it)"
            )
        self.buffer = max(batch, buffer // batch * batch)
        self._filled = -1
        self._held = torch.empty(0)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override]
        if not 0 <= number < self.total:
            raise IndexError(number)
        start = number * self.batch
        if self.tokens <= self.buffer:
            self._fill(0)
            parts, stop = [], start + self.batch
            while start < stop:
                turn, place = divmod(start, self.tokens)
                parts.append(self._order(turn, self.tokens)[place : place + stop - start])
                start += len(parts[-1])
            return self._held[torch.cat(parts).to(self._held.device)]
        self._fill(start // self.buffer)
        start %= self.buffer
        return self._held[start : start + self.batch]

    def held(self, most: int) -> Tensor:
        """Up to `most` vectors of what is in memory now."""
        return self._held[:most]

    def _fill(self, number: int) -> None:
        if number == self._filled:
            return
        self._held = torch.empty(0)  # before the next ones are there
        if self.tokens <= self.buffer:
            wanted = {row: [(0, int(length))] for row, length in enumerate(self.lengths)}
        else:
            wanted = self._wanted(number * self.buffer, (number + 1) * self.buffer)
        found = torch.cat(list(self._read(wanted)))
        if not bool(found.isfinite().all()):
            raise TransectError(f"{self.point} {self.layer} of the model holds NaN or infinite values on this text")
        if self.tokens > self.buffer:
            found = found[self._order(-1 - number, len(found)).to(found.device)]
        self._held, self._filled = found, number

    def _order(self, turn: int, count: int) -> Tensor:
        """A permutation of its own for every round; a negative number is that of a buffer."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) % 2**63)
        return torch.randperm(count, generator=generator)

    def _wanted(self, start: int, stop: int) -> dict[int, list[tuple[int, int]]]:
        """Which taken tokens of which sequences are the places start to stop - 1 of the endless stream."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for turn in range(start // self.tokens, (stop - 1) // self.tokens + 1):
            order = self._order(turn, len(self.rows))
            ends = self.lengths[order].cumsum(0) + turn * self.tokens
            borders = [turn * self.tokens, *ends.tolist()]
            for row, (a, b) in zip(order.tolist(), pairwise(borders), strict=True):
                low, high = max(a, start), min(b, stop)
                if low < high:
                    wanted.setdefault(row, []).append((low - a, high - a))
        return wanted

    def _read(self, wanted: Mapping[int, Sequence[tuple[int, int]]]) -> Iterator[Tensor]:
        """The activations (n x D) of these tokens of each sequence; sequences of one shape run together."""
        rows = sorted(wanted, key=lambda row: (str([t.shape for t in self.rows[row].values()]), row))
        batches = stacked([self.rows[row] for row in rows], self.together)
        place = 0
        for batch in batches:
            vectors = self._run(batch)
            for one, taken in zip(vectors, counted(batch, self.first), strict=True):
                kept = one[taken.to(one.device)]
                yield from (kept[low:high] for low, high in wanted[rows[place]])
                place += 1

    def _run(self, batch: Mapping[str, Tensor]) -> Tensor:
        """B x T x D."""
        model = self.anatomy.model
        watching = watch(self.anatomy, [self.point], [self.layer])
        with torch.no_grad(), at_rest(model), stopping_behind(self.anatomy, self.layer), watching as seen:
            run_body(model, to_device(batch, model.device))
        return numbered(getattr(seen, self.point)[self.layer], batch)


def numbered(found: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Activations as B x T x D in float32 or wider, also where the model has flattened batch and positions."""
    found = found.reshape(*batch["input_ids"].shape, found.shape[-1])
    return found if found.dtype == torch.float64 else found.float()


def _one(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[None] for name, tensor in row.items()}
