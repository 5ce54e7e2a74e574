"""Examples with one class each: texts padded to a batch, and images."""

from __future__ import annotations

import io
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import BadData
from .sources import Row, check_file
from .text import documents


def text_batches(
    rows: list[Row], model: Any, tokenizer: Any, length: int, batch_size: int, special: bool
) -> list[dict[str, Tensor]]:
    """Tokenised texts, padded to the longest of their batch and cut off after `length` tokens, and their labels (B).

    special: with the tokenizer's special tokens.
    """
    if tokenizer.pad_token_id is None:
        raise BadData("batches of texts need padding: set tokenizer.pad_token (and model.config.pad_token_id)")
    texts, labels = list(documents(rows)), labels_of(rows, model)
    own = model.config.get_text_config().pad_token_id  # by which a decoder's classifier knows where a text ends
    batches = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        encoded = tokenizer(
            texts[part], padding=True, truncation=True, max_length=length, add_special_tokens=special,
            return_tensors="pt",
        )  # fmt: skip
        if own is not None:
            encoded["input_ids"].masked_fill_(encoded["attention_mask"] == 0, own)
        batches.append({**encoded, "labels": labels[part]})
    return batches


def image_batches(rows: list[Row], model: Any, processor: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """`pixel_values` (B x C x H x W, in the model's dtype), as stored or by the image processor, and `labels` (B)."""
    labels, batches = labels_of(rows, model), []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        if "pixel_values" in part[0]:
            pixels = _stacked([row["pixel_values"] for row in part])
        elif "image" not in part[0]:
            columns = ", ".join(map(repr, part[0]))
            raise BadData(f"images need a column `pixel_values` or `image`; the columns are {columns}")
        elif processor is None:
            raise BadData("images need the model's image processor: pass processor=AutoImageProcessor...")
        else:
            pixels = processor(images=[_picture(row["image"]) for row in part], return_tensors="pt")["pixel_values"]
        batches.append({"pixel_values": pixels.to(model.dtype), "labels": labels[start : start + batch_size]})
    return batches


def labels_of(rows: list[Row], model: Any) -> Tensor:
    """Class numbers (B). A class may be given by its number or by its name in the model's config."""
    names, labels = model.config.label2id, []
    for row in rows:
        label = row.get("label", row.get("labels"))
        if label is None:
            raise BadData(f"examples need a column `label`; the columns are {', '.join(map(repr, row))}")
        number = names.get(label, -1) if isinstance(label, str) else _whole(label)
        if not 0 <= number < model.config.num_labels:
            raise BadData(f"label {label!r} is none of the model's {model.config.num_labels} classes")
        labels.append(number)
    return torch.tensor(labels)


def _whole(label: Any) -> int:
    """A class number as Python's; -1, which is no class, for anything else."""
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    whole = isinstance(label, Integral) or (isinstance(label, Real) and float(label).is_integer())
    return int(cast(Any, label)) if whole else -1


def _stacked(pictures: list[Any]) -> Tensor:
    """`pixel_values` of several examples (B x C x H x W)."""
    try:
        pixels = [torch.as_tensor(picture) for picture in pictures]
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadData(f"`pixel_values` should hold numbers: {error}") from None
    shapes = {tuple(one.shape) for one in pixels}
    if len(shapes) != 1 or pixels[0].dim() != 3:
        raise BadData(f"`pixel_values` of examples should have one shape, C x H x W; they have {sorted(shapes)}")
    return torch.stack(pixels)


def _picture(image: Any) -> Any:
    """A picture from an encoded file's bytes, or from the struct of `bytes` and `path` in which data sets store it.

    Pictures and arrays of their pixels are as the processor takes them.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (bytes, dict)):
        return image
    stored = {"bytes": image, "path": None} if isinstance(image, bytes) else image
    try:
        if stored["bytes"] is None:
            check_file(Path(stored["path"]), "an image")
        return Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])).convert("RGB")
    except (MemoryError, BadData):
        raise
    except Exception as error:  # every format of pictures has errors of its own
        raise BadData(f"an image cannot be read: {error}") from None
