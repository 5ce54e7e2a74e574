"""What a model is given and what it is trained to predict: one place for every forward pass and every loss.

A batch is a dict of tensors as the model's forward takes them. `labels` is optional for causal language models (the
input itself, shifted by one) and required otherwise: -100 where nothing is to be predicted (masked language models),
or one class per example (classification of texts or images).

Text may be padded on either side (`attention_mask`), and rows may hold several sequences (`position_ids` that begin
anew): neither changes what a model does with the tokens that are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import TransectError

Batch = Mapping[str, Tensor]
Task = Literal["causal", "masked", "classification", "unknown"]
IGNORED = -100
_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "use_cache"}


def task_of(model: Any) -> Task:
    """What the model's head predicts, by its class: the next token, masked tokens, or one class per example.

    "unknown" where it has no head, or one whose loss is not known here: then only its inner activations are of use.
    """
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForConditionalGeneration") and not model.config.is_encoder_decoder:  # with images, or without
        return "causal"
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith("Classification") and "Token" not in name:
        return "classification"
    return "unknown"


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch with every tensor on that device."""
    return {key: value.to(device) for key, value in batch.items()}


def inputs_of(model: Any, batch: Batch, body: bool = False) -> dict[str, Any]:
    """What the model's forward is called with: the batch without its labels, and no key/value cache.

    Where there is padding, a model that takes `position_ids` and is given none gets them from the mask, so that every
    sequence is counted from its own first token, on whichever side the padding is. (Most models count from the left
    end of the row otherwise, and learned positions of a sequence padded on the left are then those of another place.)
    body: for `model.base_model`, which takes other arguments.
    """
    inputs: dict[str, Any] = to_device({k: v for k, v in batch.items() if k != "labels"}, model.device)
    taken = inspect.signature((model.base_model if body else model).forward).parameters
    if "use_cache" in taken or task_of(model) == "causal":
        inputs["use_cache"] = False
    mask = real_positions(inputs)
    text = inputs.keys() <= _TEXT  # where there are images, too, their places count in ways of the model's own
    if mask is not None and text and "position_ids" in taken:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0) + _first_position(model)
    return inputs


def _first_position(model: Any) -> int:
    """The number of a sequence's first position: 0, but behind the padding index in RoBERTa and its kin."""
    for name, module in model.base_model.named_modules():
        padding: Any = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return padding + 1
    return 0


def real_positions(batch: Batch) -> Tensor | None:
    """Which positions (B x T) are no padding, as booleans; None where all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask.bool()


def run_body(model: Any, batch: Batch) -> None:
    """One pass of the user's own model without its head: no logits, no loss."""
    model.base_model(**inputs_of(model, batch, body=True))


def targets_of(model: Any, batch: Batch) -> Tensor:
    """What each position predicts (B x T), or the class of each example (B); IGNORED where nothing is predicted.

    A causal model's position predicts the token behind it, if both are real, and of one sequence where several are
    packed in a row. The last position of a sequence predicts nothing.
    Raises TransectError for a model whose loss is not known, and for missing labels.
    """
    task, labels = task_of(model), batch.get("labels")
    if task == "unknown":
        raise TransectError(
            f"{type(model).__name__} has no head whose loss is known here, and a loss is needed; load it with a "
            "language-model, masked-language-model or classification head (AutoModelForCausalLM, "
            "AutoModelForMaskedLM, AutoModelFor...Classification)"
        )
    if task == "causal" and labels is None:
        labels = batch["input_ids"]
    if labels is None:
        raise TransectError(f"batches for {type(model).__name__} need `labels`, got {sorted(batch)}")
    if task == "classification":
        return labels
    real = real_positions(batch)
    if real is not None:
        labels = labels.masked_fill(~real, IGNORED)
    if task == "masked":
        return labels
    following = labels[:, 1:]
    if real is not None:
        following = following.masked_fill(~real[:, :-1], IGNORED)
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 2:
        following = following.masked_fill(positions[:, 1:] <= positions[:, :-1], IGNORED)
    return functional.pad(following, (0, 1), value=IGNORED)


def predictions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (n x classes) and labels (n) of the positions that the loss counts, see `targets_of`.

    One forward pass of the user's own module, without a key/value cache. n depends on the batch: for a causal model
    without padding it is B (T - 1). Where not all logits are needed at once, `scored` takes less memory.
    """
    batch = to_device(batch, model.device)
    targets = targets_of(model, batch).flatten()
    logits = model(**inputs_of(model, batch)).logits
    where = (targets != IGNORED).nonzero()[:, 0]
    return logits.reshape(-1, logits.shape[-1]).index_select(0, where), targets[where]


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each of the n predictions (n), in nats, computed in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="none")


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the n predictions, computed in float32 or wider."""
    return losses_of(logits, labels).sum()
