"""Token ids that the user made: rows and ready batches, with the columns beside them, and what is checked of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData
from ..forward.objective import IGNORED
from .batches import Batches
from .sources import Row

# What a tokenizer returns beside the model's inputs. Some also return token types to models without any.
_BOOKKEEPING = {
    "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping",
    "num_truncated_tokens",
}  # fmt: skip


def embedded(model: Any) -> int:
    """How many tokens the model's embedding has a row for."""
    return model.get_input_embeddings().weight.shape[0]


def tokenised_rows(rows: Iterable[Row], model: Any, limit: int | None) -> list[dict[str, Tensor]]:
    """`input_ids` (T) of each row, with the columns that the model's forward takes, such as the mask and labels.

    limit: the most tokens of a row. Other columns (texts, numbers of lines) are left out.
    """
    taken, made = _takes(model), []
    for number, row in enumerate(rows):
        if "input_ids" not in row:
            raise BadData(f"item {number} of the data has no `input_ids` as those before it; it has {_columns(row)}")
        ids = _numbers(row["input_ids"], "input_ids", number)
        if ids.dim() != 1 or not _whole(ids) or len(ids) == 0:
            raise BadData(f"a sequence should be a list of integer token ids, got {ids.dtype} {tuple(ids.shape)}")
        if limit is not None and len(ids) > limit:
            raise BadData(f"sequence {number} has {len(ids)} tokens, more than {limit}, which is the longest allowed")
        others = {
            name: _numbers(value, name, number)
            for name, value in row.items()
            if name in taken and name != "input_ids" and value is not None
        }
        made.append({"input_ids": ids.long(), **others})
        if made[-1].keys() != made[0].keys():
            raise BadData(f"item {number} of the data has {_columns(made[-1])}, but the first has {_columns(made[0])}")
    return made


def ready_batches(batches: Iterable[Row], model: Any) -> list[dict[str, Tensor]]:
    """Ready batches as they are, without a tokenizer's bookkeeping that the model does not take."""
    left_out, ready = _BOOKKEEPING - _takes(model), []
    for number, batch in enumerate(batches):
        kept = {name: value for name, value in batch.items() if name not in left_out}
        wrong = [name for name, value in kept.items() if not isinstance(value, Tensor)]
        if wrong:
            raise BadData(f"a batch is a dict of tensors; of batch {number} {', '.join(map(repr, wrong))} is not")
        ready.append(kept)
    return ready


def fitting(batches: Iterable[dict[str, Tensor]], model: Any) -> Batches:
    """Batches whose ids all have a row in the embedding.

    Padding needs none: where `attention_mask` is 0, an id without a row (a [PAD] that was added to the tokenizer alone)
    becomes the model's padding id, or 0, and is no label either. Raises BadData for other ids without a row.
    """
    return Batches([_fitting(batch, model) if "input_ids" in batch else batch for batch in batches])


def _fitting(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    ids, mask, labels, rows = batch["input_ids"], batch.get("attention_mask"), batch.get("labels"), embedded(model)
    if not _whole(ids):
        raise BadData(f"`input_ids` should hold integer token ids, and are {ids.dtype}")
    if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        raise BadData(f"`attention_mask` {tuple(mask.shape)} and `input_ids` {tuple(ids.shape)} differ in shape")
    padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask == 0
    outside = (ids < 0) | (ids >= rows)
    if bool((outside & ~padding).any()):
        smallest, largest = (int(bound) for bound in ids[~padding].aminmax())
        raise BadData(
            f"tokenizer and model disagree: the token ids go from {smallest} to {largest}, but the model's "
            f"embedding has {rows} rows"
        )
    if bool(outside.any()):
        own = getattr(model.config.get_text_config(), "pad_token_id", None)
        batch = {**batch, "input_ids": ids.masked_fill(outside, own if own is not None and 0 <= own < rows else 0)}
    if labels is not None and labels.shape == ids.shape:
        labels = labels.masked_fill(outside, IGNORED)
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= rows))
        if bool(wrong.any()):
            raise BadData(
                f"the label {int(labels[wrong][0])} is no token: labels are token ids, of which the model has {rows}, "
                f"or {IGNORED} where nothing is predicted"
            )
        if bool(outside.any()):
            batch["labels"] = labels
    return batch


def _takes(model: Any) -> set[str]:
    """The names that the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def _numbers(value: Any, name: str, number: int) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadData(
            f"item {number} of the data: `{name}` should hold numbers, not a {type(value).__name__} of "
            f"{type(value[0]).__name__ if isinstance(value, (list, tuple)) and value else 'nothing'}"
        ) from None


def _whole(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _columns(row: Row) -> str:
    return ", ".join(map(repr, row))
