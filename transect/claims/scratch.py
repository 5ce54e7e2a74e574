"""Text for claims that train a small model from scratch: one pass over it, without a sequence coming twice."""

from __future__ import annotations

from torch import Tensor

from ..data import Batches, load
from ..data.batches import stacked
from .context import Context


def fresh_rows(context: Context, tokens: int) -> tuple[list[Tensor], str]:
    """Sequences to train on (1-D, without padding), and where they are from, in words.

    The calibration text; of the bundled model, whose text is made on demand, as much as has so many tokens.
    """
    batches, source = context.calibration, "the calibration text"
    if context.specimen.name == "organism":
        specimen, length = context.specimen, max(map(len, batches.texts()))
        batches = load(
            "organism:calibration", specimen.model, specimen.tokenizer, sequences=max(1, -(-tokens // length)),
            full_only=True,
        )  # fmt: skip
        source = "text of the bundled model's world"
    return list(batches.texts()), source


def cut(rows: list[Tensor], length: int, count: int) -> list[Tensor]:
    """Pieces of this many tokens, each sequence's in order; the first `count` of them, or all that there are."""
    pieces = [row[start : start + length] for row in rows for start in range(0, len(row) - length + 1, length)]
    return pieces[:count]


def batches_of(pieces: list[Tensor], size: int) -> Batches:
    """Pieces of one length, so many in a batch."""
    return Batches(stacked([{"input_ids": piece} for piece in pieces], size))
