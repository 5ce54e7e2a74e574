"""What a Hugging Face user may hold, as one item after another; what cannot be read is refused by its name.

Nothing is iterated over before it is known what it is: iterating over a dict, a data frame or a `BatchEncoding` gives
their keys, and over a text its characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import BadData
from .batches import Batches
from .chat import CHATS
from .sources import READERS, Row, exists, rows_of

# What a tensor of this name has for dimensions in a batch, at least; in a row it has one less.
_IN_A_BATCH = {"input_ids": 2, "inputs_embeds": 3, "pixel_values": 4}


def is_batch(row: Mapping[str, Any]) -> bool:
    """Whether a dict is a ready batch, as a model's forward takes it, and not one example."""
    known = [(row[name], dims) for name, dims in _IN_A_BATCH.items() if name in row]
    return bool(known) and isinstance(known[0][0], Tensor) and known[0][0].dim() >= known[0][1]


def items_of(data: Any, what: str) -> Iterator[Any]:
    """The items of a container: rows of a table, of a data set or of a dict of columns as dicts, others as they are.

    A dict that is no table is one item. what: what is read, for messages. Raises BadData for what has no items, or
    none in an order.
    """
    _refuse(data, what)
    if isinstance(data, Mapping):
        yield from _of_mapping(data, what, columns=True)
    elif _is(data, "pandas", "DataFrame"):
        for row in data.to_dict("records"):
            yield {
                str(name): value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in row.items()
                if not _missing(value)
            }
    elif hasattr(data, "to_pylist"):  # a table or an array of Arrow
        yield from data.to_pylist()
    elif hasattr(type(data), "__iter__"):
        yield from data
    elif hasattr(type(data), "__getitem__") and hasattr(type(data), "__len__"):  # a map-style data set of torch
        yield from (data[number] for number in range(len(data)))
    else:
        raise BadData(f"{what} cannot be read from a {_named(data)}; give a list, a data set or a path")


def entries_of(data: Any) -> Iterator[Row]:
    """Rows (one example each: text, messages, token ids, an image) or ready batches of whatever the user has."""
    if isinstance(data, (Tensor, np.ndarray)):
        yield from _of_array(_plain(data), "the data")
        return
    if _is(data, "tokenizers", "Encoding"):
        data = [data]
    collated = isinstance(data, DataLoader)
    before: Any = None
    for number, item in enumerate(items_of(data, "the data")):
        item = _plain(item)
        several = _is_nested(item) or (isinstance(item, Tensor) and item.dim() == 2)
        if several and (_is_mask(item, before) or (_is_nested(item) and any(map(_is_mask, item[1:], item)))):
            raise BadData(
                f"item {number} of the data has an attention mask, by its 0 and 1, that would be read as token ids: "
                'give dicts, as {"input_ids": ..., "attention_mask": ...}'
            )
        before = item if several else None
        yield from _of_item(item, f"item {number} of the data", collated)


def _of_item(item: Any, where: str, collated: bool) -> Iterator[Row]:
    """item: as `_plain` leaves it. collated: an item is several examples, as a DataLoader puts them together."""
    if isinstance(item, str):
        if item.endswith(tuple(READERS)) and exists(Path(item)):
            raise BadData(f"{where} is the name of a file, {item!r}, and no text: give the name alone, or Path(...)")
        yield {"text": item}
    elif isinstance(item, Path):
        yield from rows_of(item, organism_tokens=0)
    elif isinstance(item, Mapping):
        if "role" in item and "content" in item:
            raise BadData(f"{where} is a message and no conversation: a conversation is given in a list, as [messages]")
        yield from _of_mapping(item, where, columns=collated)
    elif isinstance(item, Tensor):
        yield from _of_array(item, where)
    elif _is(item, "tokenizers", "Encoding"):
        yield {"input_ids": item.ids, "attention_mask": item.attention_mask}
    elif _is(item, "pandas", "DataFrame") or hasattr(item, "to_pylist"):
        yield from entries_of(item)
    elif isinstance(item, (list, tuple)):
        yield from _of_list(item, where, collated)
    else:
        _refuse(item, where)
        if isinstance(item, (bool, int, float)):
            raise BadData(f"{where} is a number: one sequence of token ids is given in a list, as [ids]")
        raise BadData(f"data should be texts, token ids or batches; {where} is a {_named(item)}")


def _of_list(item: list[Any] | tuple[Any, ...], where: str, collated: bool) -> Iterator[Row]:
    """An item that is a list: token ids, a conversation, or what a DataLoader made of texts and tensors."""
    first = item[0] if item else None
    if isinstance(first, Mapping):
        yield {"messages": list(item)}
    elif isinstance(first, str) and collated:
        yield from ({"text": text} for text in item)
    elif isinstance(first, str):
        raise BadData(f"{where} is a list of {len(item)} strings: give each text as one string, not cut into words")
    elif isinstance(first, (Tensor, np.ndarray)) and first.ndim > 0:
        if len(item) > 1:
            raise BadData(
                f"{where} is a {_named(item)} of {len(item)} tensors that have no names: give dicts, such as "
                '{"input_ids": ..., "attention_mask": ..., "labels": ...}'
            )
        yield from _of_array(_plain(first), where)
    elif isinstance(first, (list, tuple)) and first and isinstance(first[0], (list, tuple)):
        raise BadData(f"{where} is nested too deeply: a sequence of token ids is a list of integers")
    elif isinstance(first, (list, tuple)) and not (first and isinstance(first[0], Mapping)):
        yield from ({"input_ids": ids} for ids in item)  # tokenised in groups
    else:
        yield {"input_ids": item}


def _of_array(ids: Any, where: str) -> Iterator[Row]:
    """Token ids of one or several sequences; texts in a numpy array."""
    if not isinstance(ids, Tensor):  # an array of objects
        yield from entries_of(ids)
        return
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise BadData(
            f"{where} is a {ids.dtype} tensor of shape {tuple(ids.shape)}, and token ids are integer token ids "
            '(sequences x tokens); images are given as {"pixel_values": ..., "labels": ...}'
        )
    if ids.dim() == 1 and where != "the data":
        yield {"input_ids": ids}
    elif ids.dim() == 2:
        yield from ({"input_ids": row} for row in ids)
    else:
        raise BadData(
            f"token ids should be a tensor (sequences x tokens), but the shape of {where} is {tuple(ids.shape)}"
        )


def _of_mapping(given: Mapping[Any, Any], what: str, columns: bool) -> Iterator[Row]:
    """A ready batch or a row as it is, a table row by row. columns: a dict of lists is a table and not a row."""
    row = {str(name): _plain(value) for name, value in given.items()}
    if not row:
        raise BadData(f"{what}: the dict is empty")
    parts = [name for name, value in row.items() if isinstance(value, (Batches, DataLoader, Dataset)) or _is_hub(value)]
    if parts:
        raise BadData(
            f"{what}: a dict of data sets ({', '.join(map(repr, parts))}); give one of them, as data[{parts[0]!r}]"
        )
    if is_batch(row) or not _is_table(row, columns):
        yield row
        return
    sizes = {name: len(value) for name, value in row.items()}
    if len(set(sizes.values())) != 1:
        raise BadData(f"{what}: the columns should have one entry an example, but their lengths are {sizes}")
    for values in zip(*row.values(), strict=True):
        plain = (it.item() if isinstance(it, Tensor) and it.dim() == 0 else it for it in values)
        yield dict(zip(row, plain, strict=True))


def _is_mask(value: Any, before: Any) -> bool:
    """Whether numbers can only be the mask of those before them: as many, row by row, and nothing but 0 and 1.

    So the values of what a tokenizer returns lie behind one another, once their names are lost.
    """
    mask = _rows_of(value)
    if not mask or any(one not in (0, 1) for row in mask for one in row):
        return False
    ids = _rows_of(before)
    return [len(row) for row in ids] == [len(row) for row in mask] and any(
        one not in (0, 1) for row in ids for one in row
    )


def _rows_of(value: Any) -> list[Any]:
    """Numbers in a tensor or in lists, row by row; nothing of anything else."""
    value = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    rows = list(value) if _is_nested(value) else [value]
    return rows if all(isinstance(row, (list, tuple)) and row and isinstance(row[0], int) for row in rows) else []


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple))


def _is_table(row: Row, columns: bool) -> bool:
    """Whether a dict holds the columns of several examples. columns: where its lists could also be those of one."""
    if not all(
        isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim()) for value in row.values()
    ):
        return False
    for name in ("input_ids", *CHATS):
        if name in row:
            first = row[name][0] if len(row[name]) else None
            return isinstance(first, (list, tuple, np.ndarray)) or (isinstance(first, Tensor) and first.dim() > 0)
    return columns and "pixel_values" not in row


def _plain(value: Any) -> Any:
    """Numpy arrays as tensors, or as lists of what is no number; columns of pandas and of data sets as lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "iu":
            return torch.from_numpy(value.astype(np.int64))
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "fb" else value.tolist()
    if _is(value, "pandas", "Series") or _is(value, "datasets", "Column"):
        return list(value)
    return value


def _refuse(data: Any, what: str) -> None:
    """BadData for what can be iterated over, or looks like data, and is none."""
    reasons: list[tuple[Callable[[Any], bool], str]] = [
        (lambda it: it is None, "is None; give texts, token ids, batches, or a path"),
        (lambda it: isinstance(it, (bytes, bytearray, memoryview)), "is bytes; decode them, and give a list of texts"),
        (lambda it: isinstance(it, (set, frozenset)), "is a set, which has no order to repeat; give sorted(...) of it"),
        (lambda it: hasattr(it, "read"), "is an open file; give its path"),
        (lambda it: isinstance(it, str), "is one string; give a list of them"),
    ]
    for holds, reason in reasons:
        if holds(data):
            raise BadData(f"{what} {reason}")


def _is(value: Any, package: str, name: str | None = None) -> bool:
    """Whether a value is of that package's class (any class by default), without importing the package."""
    return any(
        kind.__module__.split(".")[0] == package and name in (None, kind.__name__) for kind in type(value).__mro__
    )


def _is_hub(value: Any) -> bool:
    return _is(value, "datasets", "Dataset") or _is(value, "datasets", "IterableDataset")


def _missing(value: Any) -> bool:
    """NaN, which pandas has where a row lacks a column."""
    return isinstance(value, float) and value != value


def _named(value: Any) -> str:
    return type(value).__name__
