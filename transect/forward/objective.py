"""What a model is given and what it is trained to predict: one place for every forward pass and every loss.

A batch is a dict of tensors as the model's forward takes them. `labels` is optional for causal language models (the
input itself, shifted by one) and required otherwise: -100 where nothing is to be predicted (masked language models),
one class per example (classification of texts or images), or the last hidden states (B x T x d) that another model puts
out (text models without a head, whose loss is how far theirs are from those).

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
Task = Literal["causal", "masked", "classification", "embedding", "unknown"]
IGNORED = -100
_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "use_cache"}


def task_of(model: Any) -> Task:
    """What the model's head predicts, by its class: the next token, masked tokens, or one class per example.

    "embedding" is a text model without a head, whose last hidden states are what it is for. "unknown" where the head is
    one whose loss is not known here, and for other models without one: then only their inner activations are of use.
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
    if name.endswith("Model") and model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        return "embedding"
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
        positions = (mask.long().cumsum(1) - 1).clamp_min(0) + _first_position(model)
        length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
        inputs["position_ids"] = positions[:, -length:]  # behind a cache, the mask tells of what is in it too
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
    packed in a row. The last position of a sequence predicts nothing. Where hidden states are what is asked for, they
    are asked for at every real position, and 0 says so.
    Raises TransectError for a model whose loss is not known, and for missing labels.
    """
    task, labels = task_of(model), batch.get("labels")
    if task == "unknown":
        raise TransectError(
            f"{type(model).__name__} has no head whose loss is known here, and a loss is needed; load it with a "
            "language-model, masked-language-model or classification head (AutoModelForCausalLM, "
            "AutoModelForMaskedLM, AutoModelFor...Classification)"
        )
    if task == "embedding":
        real = real_positions(batch)
        everywhere = torch.zeros_like(batch["input_ids"])
        return everywhere if real is None else everywhere.masked_fill(~real, IGNORED)
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


def labels_at(model: Any, batch: Batch, targets: Tensor) -> Tensor:
    """The labels (n) of the positions that the loss counts, or hidden states there (n x d), on the model's device.

    targets: of the batch, see `targets_of`. TransectError for a model without a head where the batch has no states.
    """
    counted = targets != IGNORED
    if task_of(model) != "embedding":
        return targets[counted]
    if "labels" not in batch:
        raise TransectError(
            f"{type(model).__name__} has no head: its loss is how far its last hidden states are from those of the "
            "model that it was made from, and the batches hold none (`labels`, B x T x d): compare it with that model "
            "(`transect compare`), or repair it towards that (recover, how=distill, teacher=...). For a loss of its "
            "own load it with a head (AutoModelForCausalLM, AutoModelForMaskedLM, ...)"
        )
    return batch["labels"].to(targets.device)[counted]


def outputs_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The model's logits, or the last hidden states of one without a head."""
    output = model(**inputs)
    return output.last_hidden_state if task_of(model) == "embedding" else output.logits


def predictions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (n x classes) and labels (n) of the positions that the loss counts, see `targets_of`.

    Of a model without a head hidden states (n x d) and those that they should be (n x d).
    One forward pass of the user's own module, without a key/value cache. n depends on the batch: for a causal model
    without padding it is B (T - 1). Where not all logits are needed at once, `scored` takes less memory.
    """
    batch = to_device(batch, model.device)
    targets = targets_of(model, batch)
    labels = labels_at(model, batch, targets)
    logits = outputs_of(model, inputs_of(model, batch))
    where = (targets.flatten() != IGNORED).nonzero()[:, 0]
    return logits.reshape(-1, logits.shape[-1]).index_select(0, where), labels


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each of the n predictions (n), in nats, computed in float32 or wider.

    labels: classes (n); or what the logits are hidden states in place of (n x d), and the loss is their relative
    squared error |y - t|^2 / |t|^2.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if labels.is_floating_point():
        labels = labels.to(wide.dtype)
        return (wide - labels).square().sum(-1) / labels.square().sum(-1).clamp_min(torch.finfo(wide.dtype).tiny)
    return functional.cross_entropy(wide, labels, reduction="none")


def agreement(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each of the n predictions 1 if the likeliest class is the right one, else 0; of hidden states the cosine."""
    if labels.is_floating_point():
        return functional.cosine_similarity(logits.float(), labels.float(), dim=-1)
    return (logits.argmax(-1) == labels).float()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the n predictions, computed in float32 or wider."""
    return losses_of(logits, labels).sum()
