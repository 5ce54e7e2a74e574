"""Training a claim's own small models on text, by the next token, and comparing them seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import Batches
from ..training import Machine, Problem, Run, Schedule, State, train
from .context import Context, Measured
from .parts_from_scratch import BATCH, LENGTH, RATE
from .scratch import batches_of, cut, fresh_rows

HELD_OUT = 256  # sequences, at most, on which a model is measured


def text_length(context: Context) -> int:
    """Tokens of a sequence in training and in measuring: a model says little of places that it was not trained on."""
    context.require_language_model()
    return min(LENGTH, max(map(len, context.evaluation.texts())))


def in_pieces(context: Context, text: Batches, most: int | None = None) -> Batches:
    """A text, or `most` pieces of it, cut into sequences as long as those of the training."""
    rows = list(text.texts())
    return batches_of(cut(rows, text_length(context), most or sum(map(len, rows))), BATCH)


def held_out(context: Context) -> Batches:
    """The held-out text in such pieces."""
    if "held-out pieces" not in context.shared:
        context.shared["held-out pieces"] = in_pieces(context, context.evaluation, HELD_OUT)
    return context.shared["held-out pieces"]


def measured_on_text(context: Context, model: Any) -> Measured:
    """The loss on these pieces of the held-out text."""
    return Context(context.model, None, held_out(context)).evaluate(model, 1.0)


def trained_on_text(
    context: Context, model: Any, steps: int, seed: int, *, skipped: int = 0, rate: float = RATE,
    factors: Callable[[float], Mapping[str, float]] | None = None, added: Callable[[], Tensor] | None = None,
) -> Any:  # fmt: skip
    """The model, trained; the same data and order for every model of one seed, and nothing decays.

    skipped: steps of whose text nothing is taken, such as what it was trained on before. factors: share of the training
    that is done -> factors of the learning rate, by the parameter's name. added: to the loss, after the model has run.
    """
    count = (skipped + steps) * BATCH
    pieces = cut(fresh_rows(context, count * LENGTH)[0], text_length(context), count)
    rows = pieces[skipped * BATCH :] or pieces
    model.to(context.model.device)
    order = torch.Generator().manual_seed(seed)

    def loss(_: int) -> tuple[Tensor, float]:
        chosen = torch.randint(len(rows), (BATCH,), generator=order).tolist()
        ids = torch.stack([rows[index] for index in chosen]).to(model.device)
        found = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found if added is None else found + added(), 1

    parameters = dict(model.named_parameters())
    problem = Problem("training", parameters, range(steps), loss, None, model.train)
    if factors is not None:
        problem.renew, problem.renew_every = lambda: factors(problem.at / steps), 1
    schedule = Schedule(lr=rate, warm_up=0.1, shuffle=False)
    train(problem, Run(schedule, Machine(model.device), State(None), context.progress), {})
    return model.eval()
