"""Pretraining and fine-tuning of models side by side, through the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from ....statistics import Progress
from ....training import Machine, Problem, Run, Schedule, State, train
from .facts import Rows
from .layer import OneLayer

_LOGITS = 2**24  # numbers at a time: 64 MiB in float32


@dataclass(frozen=True)
class Steps:
    """A budget: full-batch steps of AdamW at one rate, without warm-up or decay of the rate (the card's design)."""

    count: int
    lr: float
    weight_decay: float = 0.01


PRETRAINING, FULL, LOW_RANK = Steps(500, 3e-3), Steps(150, 1e-3), Steps(100, 1e-2)


def pieces(model: OneLayer, rows: Rows) -> Iterator[Rows]:
    """The rows of all models (G, B), so many at a time that their logits take little memory."""
    size = max(1, _LOGITS // model.unembedding[:, :, 0].numel())
    device = model.unembedding.device
    for tokens, answers in zip(rows.tokens.split(size, 1), rows.answers.split(size, 1), strict=True):
        yield Rows(tokens.to(device), answers.to(device))


def summed_loss(model: OneLayer, rows: Rows) -> Tensor:
    """Cross-entropy of the answers in nats, summed over models and rows."""
    return functional.cross_entropy(model(rows.tokens).flatten(0, 1), rows.answers.flatten(), reduction="sum")


def fit(
    model: OneLayer,
    rows: Rows,
    steps: Steps,
    name: str,
    parameters: Mapping[str, nn.Parameter] | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Train every model on its rows (G, B), all of them in every step; each goes as it would alone.

    What is lowered is the sum over models of the mean over their rows; AdamW treats every number for itself and no
    gradient is clipped, so no model feels another. parameters: what is trained; default all. after_step: called with
    the number of steps done.
    """
    trained = dict(parameters or model.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    batches = list(pieces(model, rows))
    schedule = Schedule(
        lr=steps.lr, epochs=steps.count, accumulate=len(batches), warm_up=0.0, shape="constant", clip=None,
        options={"weight_decay": steps.weight_decay}, shuffle=False,
    )  # fmt: skip
    problem = Problem(
        name, trained, batches, lambda piece: (summed_loss(model, piece), piece.answers.shape[1]), None, model.train,
        after_step=None if after_step is None else lambda step, _: after_step(step),
    )  # fmt: skip
    train(problem, Run(schedule, Machine(model.unembedding.device), State(None), progress), {})
    model.requires_grad_(True)
