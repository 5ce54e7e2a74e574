"""What a model is trained to predict, and its loss: one place for statistics, allocation and evaluation.

A batch is a dict of tensors as the model's forward takes them. `labels` is optional for causal language models (the
input itself, shifted by one) and required otherwise: -100 where nothing is to be predicted (masked language models),
or one class per example (classification of texts or images).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import TransectError

Batch = Mapping[str, Tensor]
Task = Literal["causal", "masked", "classification"]
IGNORED = -100


def task_of(model: Any) -> Task:
    """What the model's head predicts, by its class: the next token, masked tokens, or one class per example."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith("Classification") and "Token" not in name:
        return "classification"
    raise TransectError(
        f"{name} has no head whose loss is known here; load it with a language-model, masked-language-model or "
        "classification head (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelFor...Classification)"
    )


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch with every tensor on that device."""
    return {key: value.to(device) for key, value in batch.items()}


def predictions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (n x classes) and labels (n) of the positions that the loss counts, padding left out.

    One forward pass of the user's own module, without a key/value cache. n depends on the batch: for a causal model
    without padding it is B (T - 1), since the first token of a sequence has no prediction.
    """
    task = task_of(model)
    batch = to_device(batch, model.device)
    labels = batch.pop("labels", None)
    if task == "causal":
        logits = model(**batch, use_cache=False).logits
        if labels is None:
            labels = batch["input_ids"]
            if "attention_mask" in batch:
                labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif labels is None:
        raise TransectError(f"batches for {type(model).__name__} need `labels`, got {sorted(batch)}")
    else:
        logits = model(**batch).logits
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if bool((labels == IGNORED).any()):
        counted = labels != IGNORED
        logits, labels = logits[counted], labels[counted]
    return logits, labels


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the n predictions, computed in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="sum")
