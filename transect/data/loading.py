"""`load`: whatever the user has, as batches for their model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadData
from ..forward.objective import task_of
from .batches import Batches, evenly_spaced, stacked
from .chat import chat_stream, is_chat
from .containers import entries_of, is_batch
from .labelled import image_batches, labels_of, text_batches
from .masking import masked
from .sources import Row, rows_of
from .text import cut, documents, specials_of, token_stream, with_head
from .tokenised import embedded, fitting, ready_batches, tokenised_rows

LONGEST = 2048  # tokens a sequence, where the user does not say
ORGANISM_TOKENS = 100_000
SpecialTokens = Literal["auto", "none"]
_logger = logging.getLogger(__name__)  # says what sequences begin with; the command line prints it


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
    special_tokens: SpecialTokens = "auto",
    longest: int = LONGEST,
) -> Batches:
    """Batches for the model, from text, token ids, labelled examples or ready batches.

    data: one of
        texts: a list, a generator, a column of a data frame or of a data set, a numpy array of them;
        a path: .txt (one document, exactly as it stands), .jsonl or .parquet (one document or example a row; the text
            is the column `text` or the only column of strings), .safetensors (`pixel_values` N x C x H x W and `labels`
            N), or a folder of these, read in the order of their names; or a list of `Path`s;
        a hub data set, "name", "name:config" or "name:config:split" (the split is "train" unless named);
        "organism:calibration" or "organism:heldout": text of the bundled model's world;
        "pydoc:calibration" or "pydoc:heldout": the language reference inside Python's own `pydoc_data.topics`, every
            other topic by name, which every machine has;
        rows: a `datasets.Dataset` (also iterable; it is read to its end), a torch data set or a list of dicts, a dict
            of columns, a pandas data frame, an Arrow table. As in files, a row has a text, or a conversation
            (`messages` of `role` and `content`, or `conversations` of `from` and `value`, written by the tokenizer's
            chat template), or `input_ids` with `attention_mask`, `labels` and what else the model takes;
        token ids: integers (N x T) in a tensor or an array, or a list of lists or tensors, one sequence each, or what a
            tokenizer returns; used as they are;
        ready batches: `Batches`, a dict of tensors as a tokenizer returns with return_tensors="pt", a DataLoader or
            another iterable of such dicts. Nothing below applies to them, but a masked language model's batches without
            labels get them.
    model: decides by its head what is made. Causal language models get sequences of text; masked ones get such
        sequences between the tokenizer's special tokens, with 15 % of the other tokens to be predicted; text and image
        classifiers get examples and their column `label` (number or name of the class).
    tokenizer, processor: the model's, for texts and for a column `image`.
    sequence_length: tokens in a sequence, special ones included. Default: what model and tokenizer allow, at most
        `longest`, or all of a text that is shorter (unless `full_only`). A classifier's longer texts are cut off there.
    batch_size: sequences or images in a batch, at most. Only sequences of equal length share a batch.
    sequences: use only so many sequences or examples, evenly spaced over all of the data, rather than its beginning.
        Default: all.
    full_only: leave out the last sequence of a text if it is shorter than the others. Otherwise it is a batch of its
        own, so that no token is lost and none is padded.
    seed: of the choice of masked tokens.
    special_tokens: "auto" puts before every sequence of text what the tokenizer by itself puts before a text, such as
        <s>, since the model was trained with it; a tokenizer with a <s> that it does not add gets none. "none" adds
        nothing, to the texts of masked language models and classifiers neither.

    Documents are joined by the end-of-sequence token (if the tokenizer has one) into one stream, which is then cut.
    What a sequence begins with marks where a context begins, so that it does not stand between two documents, unless
    the tokenizer has no end-of-sequence token. Conversations follow one another as the template writes them.
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
    if special_tokens not in ("auto", "none"):
        raise BadData(f"special_tokens is `auto` or `none`, got {special_tokens!r}")
    if isinstance(data, Batches):
        return data
    first, source = _peeked(_rows(data, model, tokenizer, sequence_length, sequences, longest))
    if is_batch(first):
        return fitting(_ready(source, model, tokenizer, seed), model)
    task = task_of(model)
    if "input_ids" in first:
        rows = evenly_spaced(list(source), sequences)
        return fitting(_ids(rows, task, model, tokenizer, sequence_length, seed, batch_size), model)
    length = length_for(sequence_length, model, tokenizer, longest)
    if task == "classification" and _sees_images(model):
        return Batches(image_batches(evenly_spaced(list(source), sequences), model, processor, batch_size))
    if tokenizer is None:
        raise BadData(f"texts for {type(model).__name__} need its tokenizer: pass tokenizer=AutoTokenizer...")
    if task == "classification":
        examples, special = evenly_spaced(list(source), sequences), special_tokens == "auto"
        encoded = text_batches(examples, model, tokenizer, length, batch_size, special)
        return fitting(ready_batches(encoded, model), model)
    before, after = _special(tokenizer, task, special_tokens)
    if length - len(before) - len(after) < 1:
        raise BadData(f"sequence_length {length} leaves no room beside {len(before) + len(after)} special tokens")
    stream = chat_stream(source, tokenizer) if is_chat(first) else token_stream(documents(source), tokenizer, before)
    if sequence_length is None and not full_only:  # a shorter text is one sequence
        length = min(length, max(2, len(with_head(stream, before)) + len(after)))
    pieces = cut(stream, length - len(after), sequences, full_only, before)
    rows = ({"input_ids": torch.cat([piece, torch.tensor(after, dtype=piece.dtype)]).long()} for piece in pieces)
    return fitting(stacked(_with_labels(rows, task, model, tokenizer, seed), batch_size), model)


def load_rows(data: Any, sequences: int | None = None) -> list[Row]:
    """The rows of the data, dicts of their columns, for an objective that makes batches of its own of them.

    data: as in `load`, but for token ids and ready batches. sequences: only so many, evenly spaced; default all.
    Raises BadData if there is none, or if they are no rows.
    """
    first, source = _peeked(_rows(data, None, None, None, None, LONGEST))
    if is_batch(first) or "input_ids" in first:
        raise BadData("rows of texts are needed here, not token ids or batches: give the texts themselves")
    return evenly_spaced(list(source), sequences)


def _rows(
    data: Any, model: Any, tokenizer: Any, sequence_length: int | None, sequences: int | None, longest: int
) -> Iterator[dict[str, Any]]:
    """Rows or ready batches, from a name or from a container."""
    if not isinstance(data, (str, os.PathLike)):
        return entries_of(data)
    needed = ORGANISM_TOKENS
    if sequences is not None:
        needed = sequences * length_for(sequence_length, model, tokenizer, longest) + 1
    return rows_of(data if isinstance(data, str) else Path(data), organism_tokens=needed)


def _peeked(rows: Iterator[Row]) -> tuple[Row, Iterator[Row]]:
    """The first row, and all of them; an error if there is none."""
    first = next(rows, None)
    if first is None:
        raise BadData("the data is empty")
    return first, chain([first], rows)


def _ready(batches: Iterable[Row], model: Any, tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    ready = ready_batches(batches, model)
    if task_of(model) != "masked" or getattr(tokenizer, "mask_token_id", None) is None:  # then without a loss
        return ready
    return [batch if "labels" in batch else _hidden(batch, model, tokenizer, seed + n) for n, batch in enumerate(ready)]


def _hidden(batch: dict[str, Tensor], model: Any, tokenizer: Any, seed: int) -> dict[str, Tensor]:
    """A batch for a masked language model with tokens to be predicted."""
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(batch["input_ids"]))]
    (made,) = stacked(masked(rows, tokenizer, seed, embedded(model)), len(rows))
    return made


def _ids(
    rows: list[Row], task: str, model: Any, tokenizer: Any, sequence_length: int | None, seed: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Tokenised rows as batches: labels that they have are kept."""
    made = tokenised_rows(rows, model, sequence_length or _context(model))
    if task == "classification":
        if "label" not in rows[0] and "labels" not in rows[0]:
            raise BadData("token ids have no labels: give a classifier rows or batches with `labels`")
        labels = labels_of(rows, model)
        made = [{**row, "labels": label} for row, label in zip(made, labels, strict=True)]
    else:
        for number, row in enumerate(made):
            if "labels" in row and row["labels"].shape != row["input_ids"].shape:
                raise BadData(
                    f"item {number} of the data has labels of shape {tuple(row['labels'].shape)} and "
                    f"{len(row['input_ids'])} token ids: {type(model).__name__} has one label a token"
                )
        if "labels" not in made[0]:
            return stacked(_with_labels(made, task, model, tokenizer, seed), batch_size)
    return stacked(made, batch_size)


def _with_labels(
    rows: Iterable[dict[str, Tensor]], task: str, model: Any, tokenizer: Any, seed: int
) -> Iterable[dict[str, Tensor]]:
    """What is to be predicted: for a masked language model some hidden tokens, for a causal one the rows themselves."""
    return masked(rows, tokenizer, seed, embedded(model)) if task == "masked" else rows


def _sees_images(model: Any) -> bool:
    return model.main_input_name == "pixel_values"


def _special(tokenizer: Any, task: str, special_tokens: SpecialTokens) -> tuple[list[int], list[int]]:
    """What stands before and after each sequence of text. A note says it, where it is something or was chosen."""
    if special_tokens == "none":
        _logger.info("sequences begin with no special token, as was chosen")
        return [], []
    before, after = specials_of(tokenizer)
    if before:
        said = " ".join(map(str, tokenizer.convert_ids_to_tokens(before)))
        _logger.info("sequences begin with %s, as this tokenizer's texts do", said)
    return before, [] if task == "causal" else after  # to a causal model a cut is no end


def length_for(sequence_length: int | None, model: Any, tokenizer: Any, longest: int = LONGEST) -> int:
    """Tokens of the longest sequence: as asked, or what model and tokenizer allow, at most `longest`.

    Raises BadData where more are asked for than the model takes.
    """
    context = _context(model)
    if sequence_length is None:
        return min(context or longest, getattr(tokenizer, "model_max_length", longest), longest)
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
