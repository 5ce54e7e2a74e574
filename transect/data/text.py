"""Documents to sequences of token ids: one stream, cut without loss."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadData
from .batches import evenly_spaced
from .sources import Row, written

_GROUP = 1 << 20  # characters that are tokenised in one call, unless a single document is longer


def documents(rows: Iterable[Row]) -> Iterator[str]:
    """The texts of the rows: their column `text`, or their only column of strings."""
    column = None
    for number, row in enumerate(rows, 1):
        column = column or text_column(row)
        text = row.get(column)
        if not isinstance(text, str):
            raise BadData(f"row {number}: column {column!r} should hold a text, not {type(text).__name__}")
        yield written(text, f"row {number}")


def text_column(row: Row) -> str:
    """`text` if there is such a column, else the only column that holds a string."""
    strings = ["text"] if "text" in row else [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise BadData(f"which column is the text? Name it `text`; the columns are {', '.join(map(repr, row))}")
    return strings[0]


def token_stream(texts: Iterable[str], tokenizer: Any, before: Sequence[int] = ()) -> Tensor:
    """Ids (n, int32) of all texts one after another, with the end-of-sequence token between two texts if there is one.

    before: what stands between two texts where there is none; see `specials_of`. A text is tokenised in one call,
    whatever its length: cutting it could change the tokens at the cut.
    """
    separator = before if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    stream = array("i")
    for group in _groups(texts):
        encoded = tokenizer(group, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if stream:
                stream.extend(separator)
            stream.extend(ids)
    return torch.from_numpy(np.array(stream, dtype=np.int32))


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for text in texts:
        if not text:
            continue
        group.append(text)
        size += len(text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def cut(
    stream: Tensor, length: int, sequences: int | None, full_only: bool, before: Sequence[int] = ()
) -> list[Tensor]:
    """The stream as sequences of `length` tokens, and what remains as a last, shorter one unless `full_only`.

    sequences: only so many of the full ones, evenly spaced over the stream. before: the tokens that every sequence
    begins with, counted in its length; where the stream has them already, they are not doubled. Raises BadData if there
    is no full sequence.
    """
    pieces, rest = [], stream
    while len(rest):
        whole = with_head(rest[:length], before)
        pieces.append(whole[:length])
        rest = rest[length - (len(whole) - len(rest[:length])) :]
    full = sum(len(piece) == length for piece in pieces)
    if full == 0:
        raise BadData(
            f"the text has {len(stream)} tokens, but one sequence needs {length - len(before)}: give more text or a "
            "smaller sequence_length"
        )
    if full_only or (sequences is not None and sequences <= full):
        pieces = pieces[:full]
    return evenly_spaced(pieces, sequences)


def with_head(ids: Tensor, head: Sequence[int]) -> Tensor:
    """The tokens behind those of `head`, which are not doubled."""
    first = torch.tensor(head, dtype=ids.dtype)
    return ids if torch.equal(ids[: len(first)], first) else torch.cat([first, ids])


def specials_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer by itself puts before and after a text, such as ([CLS], [SEP]), ([<s>], []), ([], []).

    Raises BadData for a tokenizer in whose texts they cannot be told from the text.
    """
    special = set(tokenizer.all_special_ids)
    own = (tokenizer.decode([number]) for number in range(len(tokenizer)) if number not in special)
    for probe in chain(("a", "1", "."), islice(own, 100)):  # a vocabulary may lack some of them
        bare, wrapped = (tokenizer(probe, add_special_tokens=added)["input_ids"] for added in (False, True))
        starts = [i for i in range(len(wrapped)) if bare and wrapped[i : i + len(bare)] == bare]
        if starts:
            return wrapped[: starts[0]], wrapped[starts[0] + len(bare) :]
    raise BadData(
        f"what {type(tokenizer).__name__} puts before and after a text cannot be told; special_tokens=none adds nothing"
    )
