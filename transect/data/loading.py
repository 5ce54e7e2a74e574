"""`load`: whatever the user has, as batches for their model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadData
from ..forward.objective import task_of
from .batches import Batches, evenly_spaced, stacked
from .labelled import image_batches, text_batches
from .masking import masked
from .sources import rows_of
from .text import cut, documents, special_tokens, token_stream

LONGEST = 2048  # tokens a sequence, where the user does not say
ORGANISM_TOKENS = 100_000


def load(
    data: Any,
    model: Any,
    tokenizer: Any = None,
    processor: Any = None,
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    sequences: int | None = None,
    full_only: bool = False,
    seed: int = 0,
) -> Batches:
    """Batches for the model, from text, token ids, labelled examples or ready batches.

    data: one of
        a list of texts;
        a path: .txt (one document, exactly as it stands), .jsonl or .parquet (one document or example a row; the text
            is the column `text` or the only column of strings), .safetensors (`pixel_values` N x C x H x W and `labels`
            N), or a folder of these, read in the order of their names;
        a hub data set, "name", "name:config" or "name:config:split" (the split is "train" unless named);
        "organism:calibration" or "organism:heldout": text of the bundled model's world;
        token ids: an integer tensor (N x T), or a list of lists or 1-D tensors, one sequence each, used as they are;
        ready batches: `Batches` or an iterable of dicts of tensors. Nothing below applies to them.
    model: decides by its head what is made. Causal language models get sequences of text; masked ones get such
        sequences between the tokenizer's special tokens, with 15 % of the other tokens to be predicted; text and image
        classifiers get examples and their column `label` (number or name of the class).
    tokenizer, processor: the model's, for texts and for a column `image`.
    sequence_length: tokens in a sequence, special ones included. Default: what model and tokenizer allow, at most 2048,
        or all of a text that is shorter (unless `full_only`). Longer texts of a classifier are cut off there.
    batch_size: sequences or images in a batch, at most. Only sequences of equal length share a batch.
    sequences: use only so many sequences or examples, evenly spaced over all of the data, rather than its beginning.
        Default: all.
    full_only: leave out the last sequence of a text if it is shorter than the others. Otherwise it is a batch of its
        own, so that no token is lost and none is padded.
    seed: of the choice of masked tokens.

    Documents are joined by the end-of-sequence token (if the tokenizer has one) into one stream, which is then cut.
    Documents are read and tokenised a million characters at a time, but each in one call, so that none of its tokens
    changes: a .txt file takes about 160 bytes of memory a character meanwhile.
    Raises BadData, saying what came and what was expected.
    """
    for name, value, least in (
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
        ("sequences", sequences, 1),
    ):
        if value is not None and value < least:
            raise BadData(f"{name} must be at least {least}, got {value}")
    if isinstance(data, Batches):
        return data
    data = _not_empty(data)
    named = isinstance(data, (str, Path))
    if not named and isinstance(data[0], Mapping):
        return _checked(_ready(data), model)
    task = task_of(model)
    if not named and not isinstance(data[0], str):
        if task == "classification":
            raise BadData("token ids have no labels: give a classifier batches with `labels`, or a file with them")
        rows = evenly_spaced(_sequences(data, sequence_length or _context(model)), sequences)
        return _checked(_language(rows, task, tokenizer, seed, batch_size), model)

    length = _length(sequence_length, model, tokenizer)
    if named:
        needed = ORGANISM_TOKENS if sequences is None else sequences * length + 1
        source = rows_of(data, organism_tokens=needed)
    else:
        source = ({"text": text} for text in data)
    if tokenizer is None and not _sees_images(model):
        raise BadData(f"texts for {type(model).__name__} need its tokenizer: pass tokenizer=AutoTokenizer...")
    if task == "classification":
        examples = evenly_spaced(list(source), sequences)
        return _labelled(examples, model, tokenizer, processor, length, batch_size)
    at_most = sequence_length is None and not full_only
    rows = _cut_text(source, task, tokenizer, length, sequences, full_only, at_most)
    return _checked(_language(rows, task, tokenizer, seed, batch_size), model)


def _not_empty(data: Any) -> Any:
    """A name or a tensor as it is, anything else as a list; an error if there is nothing in it."""
    if not isinstance(data, (str, Path, Tensor)):
        data = list(data)
    if (isinstance(data, Tensor) and data.numel() == 0) or (isinstance(data, list) and not data):
        raise BadData("the data is empty")
    return data


def _sees_images(model: Any) -> bool:
    return model.main_input_name == "pixel_values"


def _labelled(
    examples: list[dict[str, Any]], model: Any, tokenizer: Any, processor: Any, length: int, batch_size: int
) -> Batches:
    """Batches for a classifier of images or texts."""
    if not examples:
        raise BadData("the data is empty")
    if _sees_images(model):
        return Batches(image_batches(examples, model, processor, batch_size))
    return _checked(text_batches(examples, model, tokenizer, length, batch_size), model)


def _cut_text(
    source: Iterable[dict[str, Any]],
    task: str,
    tokenizer: Any,
    length: int,
    sequences: int | None,
    full_only: bool,
    at_most: bool,
) -> list[Tensor]:
    """The documents as sequences of `length` tokens, each between special ones if tokens are to be masked.

    at_most: a shorter text is one sequence.
    """
    before, after = special_tokens(tokenizer) if task == "masked" else ([], [])
    room = length - len(before) - len(after)
    if room < 1:
        raise BadData(f"sequence_length {length} leaves no room beside {len(before) + len(after)} special tokens")
    stream = token_stream(documents(source), tokenizer)
    if at_most:
        room = min(room, max(2, len(stream)))
    rows = cut(stream, room, sequences, full_only)
    if task == "masked":
        rows = [torch.cat([torch.tensor(before), row, torch.tensor(after)]) for row in rows]
    return rows


def _language(rows: list[Tensor], task: str, tokenizer: Any, seed: int, batch_size: int) -> list[dict[str, Tensor]]:
    if task == "masked":
        return stacked(masked(rows, tokenizer, seed), batch_size)
    return stacked(({"input_ids": row.long()} for row in rows), batch_size)


def _ready(batches: Iterable[Any]) -> list[dict[str, Tensor]]:
    ready = [dict(batch) for batch in batches]
    for batch in ready:
        wrong = [name for name, value in batch.items() if not isinstance(value, Tensor)]
        if wrong or not batch:
            raise BadData(
                f"a batch is a dict of tensors; {', '.join(map(repr, wrong)) or 'this one'} is not or is empty"
            )
    return ready


def _sequences(data: Any, limit: int | None) -> list[Tensor]:
    """Token ids as 1-D tensors, one a sequence."""
    if isinstance(data, Tensor) and data.dim() != 2:
        raise BadData(f"token ids should be a tensor (sequences x tokens), but its shape is {tuple(data.shape)}")
    rows = []
    for row in data:
        try:
            ids = torch.as_tensor(row)
        except (TypeError, ValueError, RuntimeError):
            raise BadData(f"data should be texts, token ids or batches, not a list of {type(row).__name__}") from None
        if ids.dim() != 1 or ids.is_floating_point() or len(ids) == 0:
            raise BadData(f"a sequence should be a list of integer token ids, got {ids.dtype} {tuple(ids.shape)}")
        if limit is not None and len(ids) > limit:
            raise BadData(
                f"sequence {len(rows)} has {len(ids)} tokens, more than {limit}, which is the longest allowed"
            )
        rows.append(ids)
    return rows


def _length(sequence_length: int | None, model: Any, tokenizer: Any) -> int:
    context = _context(model)
    if sequence_length is None:
        return min(context or LONGEST, getattr(tokenizer, "model_max_length", LONGEST), LONGEST)
    if context is not None and sequence_length > context:
        raise BadData(f"sequence_length {sequence_length} is above the model's context of {context} tokens")
    return sequence_length


def _context(model: Any) -> int | None:
    """The most tokens that the model takes, or None where its config sets no limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():  # RoBERTa counts positions from behind the padding index
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            context = module.num_embeddings - module.padding_idx - 1
    return context


def _checked(batches: list[dict[str, Tensor]], model: Any) -> Batches:
    """Batches whose ids all have a row in the embedding."""
    for batch in batches:
        if "input_ids" in batch:
            rows = model.get_input_embeddings().weight.shape[0]
            smallest, largest = (int(bound) for bound in batch["input_ids"].aminmax())
            if smallest < 0 or largest >= rows:
                raise BadData(
                    f"tokenizer and model disagree: the token ids go from {smallest} to {largest}, but the model's "
                    f"embedding has {rows} rows"
                )
    return Batches(batches)
