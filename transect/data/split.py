"""The data in two parts: what is trained on, and what only measures."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadData
from .batches import Batches, stacked

Row = dict[str, Tensor]


def split(data: Batches, held_out: float, batch_size: int, seed: int) -> tuple[Batches, Batches]:
    """(training, held-out) batches: the last `held_out` share of the sequences, and the others in a random order.

    The last ones, because neighbouring sequences of a text are alike. Only sequences of one shape share a batch.
    Raises BadData unless there is at least one sequence for each part.
    """
    rows: list[Row] = [
        {name: tensor[i] for name, tensor in batch.items()}
        for batch in data
        for i in range(len(next(iter(batch.values()))))
    ]
    kept_out = max(1, round(held_out * len(rows)))
    if len(rows) <= kept_out:
        raise BadData(
            f"the data has {len(rows)} sequences of which {kept_out} would be held out, so none is left to train on: "
            "give more data, or shorter sequences (sequence_length)"
        )
    training = rows[: len(rows) - kept_out]
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [training[i] for i in order]
    shuffled.sort(key=lambda row: str([tuple(tensor.shape) for tensor in row.values()]))  # stable: random within one
    return Batches(stacked(shuffled, batch_size)), Batches(stacked(rows[-kept_out:], batch_size))


def share(batches: Batches, index: int, count: int) -> list[Row | None]:
    """Each batch's rows that process `index` of `count` computes; None where a batch has no row for it.

    So a step is made of the same sequences however many processes there are.
    """
    shared = [{name: tensor[index::count] for name, tensor in batch.items()} for batch in batches]
    return [batch if len(next(iter(batch.values()))) else None for batch in shared]
