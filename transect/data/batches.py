"""Batches of model inputs, held in memory, with an exact account of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import BadData
from ..store import keep, kept, tensor_bytes

_KIND = "batches"
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Batches:
    """Re-iterable batches, each a dict of tensors as the model's forward takes them.

    Text: `input_ids` (B x T), with `labels` (B x T; -100 where nothing is predicted) for masked language models, and
    with `attention_mask` and `labels` (B) for text classification. Images: `pixel_values` (B x C x H x W) and `labels`.
    """

    batches: list[dict[str, Tensor]]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    @cached_property
    def examples(self) -> int:
        """Number of sequences or images."""
        return sum(_size(batch) for batch in self.batches)

    @cached_property
    def tokens(self) -> int:
        """Number of positions that are not padding; 0 for images."""
        return sum(
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            for batch in self.batches
            if "input_ids" in batch
        )

    def texts(self) -> Iterator[Tensor]:
        """The token ids (T) of every sequence, padding left out; nothing for images."""
        for batch in self.batches:
            ids = batch.get("input_ids", ())
            mask = batch.get("attention_mask")
            yield from ids if mask is None else (row[real.bool()] for row, real in zip(ids, mask, strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """Hash (32 hexadecimal digits) of every tensor, its name, type and shape; the same in every process."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.batches:
            for name, tensor in sorted(batch.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def shard(self, rank: int, world_size: int) -> Batches:
        """The batches rank, rank + world_size, ...: every batch is in exactly one of the `world_size` shards."""
        return Batches(self.batches[rank::world_size])

    def save(self, path: Path) -> None:
        """Write as one safetensors file."""
        keep(path, {f"{i:06d}|{k}": t for i, batch in enumerate(self.batches) for k, t in batch.items()}, _KIND)

    @staticmethod
    def load(path: Path, of: str | None = None) -> Batches:
        """Read what `save` wrote. of: the fingerprint that they must have.

        Raises BadData if the file is missing or damaged, or holds other batches.
        """
        found = kept(path, _KIND)
        batches: dict[str, dict[str, Tensor]] = {}
        for key, tensor in (found or {}).items():
            number, name = key.split("|", 1)
            batches.setdefault(number, {})[name] = tensor
        loaded = Batches(list(batches.values()))
        if found is None or of not in (None, loaded.fingerprint):
            raise BadData(
                f"{path} does not hold the batches that were written there: it is missing, damaged or another's"
            )
        return loaded

    def take(self, examples: int) -> Batches:
        """The first `examples` sequences or images; all of them if there are fewer."""
        taken, missing = [], examples
        for batch in self.batches:
            if missing <= 0:
                break
            taken.append({name: tensor[:missing] for name, tensor in batch.items()})
            missing -= _size(batch)
        return Batches(taken)


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def stacked(rows: Iterable[dict[str, Tensor]], batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of rows in their order. A batch holds rows of one shape only, so that nothing is padded."""
    batches = []
    for _, alike in groupby(rows, key=lambda row: [tensor.shape for tensor in row.values()]):
        group = list(alike)
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            batches.append({name: torch.stack([row[name] for row in part]) for name in part[0]})
    return batches


def evenly_spaced(items: list[T], count: int | None) -> list[T]:
    """`count` of the items, spread evenly from the first on; all of them if there are not more, or for None."""
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]
