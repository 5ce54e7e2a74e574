"""A shallower relative of the model under study, trained from scratch, for claims that compare two depths."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ....statistics import Progress
from ...context import Context
from ...descent import descend
from ...registry import NotApplicable
from ...scratch import fresh_rows

STEPS, TOKENS, RATE = 500, 2048, 2e-3  # of the training; tokens of a step
LARGEST = 10_000_000  # numbers of a model that a claim trains
LEAST = 20  # tokens of text for each coordinate of the stream


def untrained(context: Context, layers: int, seed: int = 0) -> Any:
    """A model of the same configuration with fewer layers and random weights, in float32 on the model's device.

    Raises NotApplicable where it is too large to be trained in a claim.
    """
    left_out = context.anatomy.block_list[layers:].parameters()
    numbers = sum(one.numel() for one in context.model.parameters()) - sum(one.numel() for one in left_out)
    if numbers > LARGEST:
        raise NotApplicable(
            f"it trains a model of {layers} layers, which has {numbers:,} numbers here: more than the {LARGEST:,} "
            "that a claim trains"
        )
    config = copy.deepcopy(context.model.config)
    text = config.get_text_config()
    setattr(text, context.anatomy.architecture.config["blocks"], layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(context.model)(config).float()
    return model.to(context.model.device).eval()


def text_of(context: Context) -> tuple[list[Tensor], str]:
    """Sequences to train on (1-D, without padding), and where they are from.

    The calibration text; of the bundled model, whose text is made on demand, as much as one pass needs. Raises
    NotApplicable where there are fewer than LEAST tokens for each coordinate of the stream.
    """
    rows, source = fresh_rows(context, STEPS * TOKENS)
    tokens, needed = sum(map(len, rows)), LEAST * context.anatomy.config_value("hidden")
    if tokens < needed:
        raise NotApplicable(
            f"it trains a model on the calibration text, of at least {needed} tokens; there are {tokens}"
        )
    return rows, f"{tokens} tokens of {source}"


def train(model: Any, rows: list[Tensor], progress: Progress | None = None, seed: int = 0) -> None:
    """Lower the loss of a causal model on sequences, in place: STEPS steps of about TOKENS tokens each.

    See `descend`. Sequences come in random order, all of them before one comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(1, TOKENS // max(map(len, rows)))
    passes = math.ceil(STEPS * size / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)]).tolist()

    def loss(step: int) -> Tensor:
        chosen = [rows[number] for number in order[step * size : (step + 1) * size]]
        length = min(map(len, chosen))
        ids = torch.stack([row[:length] for row in chosen]).to(model.device)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout
        torch.manual_seed(seed)
        descend(model, loss, STEPS, RATE, progress=progress)
