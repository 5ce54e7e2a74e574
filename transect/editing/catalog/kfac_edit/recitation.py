"""How much of its passages a model still recites: word for word, nearly, and how alike on average.

Source of the measures: Merullo et al., 2025, arXiv:2510.24256 (strict and loose recitation, normalised Levenshtein
distance over tokens).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....data import Passage, Specimen
from ....forward import recitations

LOOSE = 0.75  # likeness from which a recitation counts as one all the same


class Recitation(NamedTuple):
    """strict: share of passages recited word for word. loose: with a likeness of `LOOSE` or more. likeness: mean."""

    strict: float
    loose: float
    likeness: float


def recitation(specimen: Specimen, passages: Sequence[Passage]) -> Recitation:
    """Let the model continue each prompt greedily, for as many tokens as its ending has, and compare.

    Likeness is 1 - (Levenshtein distance in tokens) / (tokens of the ending). passages: at least one.
    """
    pairs = [(specimen.encode(one.prompt), specimen.continuation(one.prompt, one.answer)) for one in passages]
    groups: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for given, (_, wanted) in zip(recitations(specimen.model, pairs), pairs, strict=True):
        groups[len(wanted)].append((given, wanted))
    likeness = torch.cat(
        [
            1 - levenshtein(*(torch.stack(side) for side in zip(*group, strict=True))) / length
            for length, group in groups.items()
        ]
    )
    shares = (likeness == 1, likeness >= LOOSE, likeness)
    return Recitation(*(float(share.double().mean()) for share in shares))


def levenshtein(first: Tensor, second: Tensor) -> Tensor:
    """Insertions, deletions and replacements that turn each row of `first` (n x S) into that of `second` (n x T): (n).

    One row of the usual table at a time, for all pairs at once. An entry's left neighbour enters through a running
    minimum: d[j] = j + min over k <= j of (t[k] - k), t being the row without insertions.
    """
    count = torch.arange(second.shape[1] + 1, dtype=torch.float64)
    row = count.expand(len(first), -1)
    for number in range(first.shape[1]):
        replaced = row[:, :-1] + (first[:, number, None] != second)
        without = torch.cat([row[:, :1] + 1, torch.minimum(row[:, 1:] + 1, replaced)], 1)
        row = (without - count).cummin(1).values + count
    return row[:, -1]
