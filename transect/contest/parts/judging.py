"""What a model makes of a task's examples: loss and accuracy, as training goes, and by what the answers depend on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import Diverged, TransectError
from ...evaluation import evaluate_loss
from ...forward import Batch, at_rest
from ...forward.objective import inputs_of
from ...tasks import Drawn
from ...training import own_loss

_WATCHED = 128  # examples by which a training is watched, at most


@dataclass(frozen=True)
class Judged:
    """loss: mean of an answer, in nats, or the mean squared error. accuracy: share of right ones; None for numbers."""

    loss: float
    accuracy: float | None


def loss_on(model: Any, drawn: Drawn) -> Callable[[Batch], tuple[Tensor, int]]:
    """What is lowered: of a batch, the summed loss and the number of answers."""

    def squared(batch: Batch) -> tuple[Tensor, int]:
        found = _squared_errors(model, batch)
        there = ~found.isnan()
        return found[there].sum(), int(there.sum())

    return squared if drawn.numeric else lambda batch: own_loss(model, batch)


def judged(model: Any, drawn: Drawn, size: int) -> Judged:
    """Loss and accuracy, `size` examples at a time. Diverged if the loss is not finite."""
    if drawn.numeric:
        loss = float(scores_of(model, drawn, size).nanmean())
        if loss != loss or loss == float("inf"):
            raise Diverged("the squared error of the trained model is not finite. Lower the rate")
        return Judged(loss, None)
    try:
        found = evaluate_loss(model, drawn.batches(size))
    except TransectError as reason:
        raise Diverged(f"trained, but {reason}") from reason
    return Judged(found.loss, found.accuracy)


@torch.no_grad()
def scores_of(model: Any, drawn: Drawn, size: int) -> Tensor:
    """Of each answer of sequences (count x T), 1 if it is right and else 0, or its squared error; NaN where none is."""
    found = []
    with at_rest(model):
        for batch in drawn.batches(size):
            if drawn.numeric:
                found.append(_squared_errors(model, batch))
                continue
            said = model(**inputs_of(model, batch)).logits.argmax(-1)
            found.append(functional.pad((said[:, :-1].cpu() == batch["labels"][:, 1:]).float(), (1, 0)))
    return torch.cat(found).cpu().masked_fill(~drawn.asked, torch.nan)


def _squared_errors(model: Any, batch: Batch) -> Tensor:
    """(number that the position before says - answer)² of each position (B x T); NaN where nothing is asked."""
    said = model(**inputs_of(model, batch)).logits[:, :-1, 0].float()
    wanted = batch["labels"][:, 1:].to(said.device)
    errors = (said - wanted.nan_to_num()).square().masked_fill(wanted.isnan(), torch.nan)  # with gradients, not NaN
    return functional.pad(errors, (1, 0), value=torch.nan)


def means_over(drawn: Drawn, scores: Tensor) -> dict[str, float]:
    """The mean score of the answers by `Drawn.over`, from the smallest on. scores: count x T."""
    assert drawn.over is not None
    over, found = drawn.over[drawn.asked], scores[drawn.asked]
    return {str(value): float(found[over == value].mean()) for value in over.unique().tolist()}


def baselines_of(drawn: Drawn, scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each baseline: its loss or accuracy, with its standard error over the examples, and `by`."""
    rows = []
    for name, score in scores.items():
        each = torch.where(drawn.asked, score, torch.nan).nanmean(dim=1)
        column = "loss" if drawn.numeric else "accuracy"
        error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
        row = {"entrant": name, "baseline": True, column: float(score[drawn.asked].mean()), f"{column}_error": error}
        rows.append({**row, "by": {} if drawn.over is None else means_over(drawn, score)})
    return rows


class Watch:
    """Held-out loss and accuracy as a training goes, which its state takes along.

    seen: [loss, accuracy] (None for numbers) every `every` steps and at the end. seconds: that looking took.
    """

    def __init__(self, model: Any, drawn: Drawn, size: int, every: int, steps: int) -> None:
        few = slice(0, _WATCHED)
        over = None if drawn.over is None else drawn.over[few]
        self.drawn = Drawn(drawn.inputs[few], drawn.answers[few], drawn.vocabulary, over)
        self.model, self.size, self.every, self.steps = model, size, every, steps
        self.rows: list[list[float]] = []

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Look, if it is time."""
        if step % self.every == 0 or step == self.steps:
            started = time.perf_counter()
            now = judged(self.model, self.drawn, self.size)
            accuracy = torch.nan if now.accuracy is None else now.accuracy
            self.rows.append([now.loss, accuracy, time.perf_counter() - started])

    def held(self) -> dict[str, Tensor]:
        """What was seen, as a tensor (looks x 3)."""
        return {"seen": torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 3)}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `held` once gave."""
        self.rows = tensors["seen"].tolist()

    @property
    def seen(self) -> list[list[float | None]]:
        """[loss, accuracy] of each look."""
        return [[loss, None if accuracy != accuracy else accuracy] for loss, accuracy, _ in self.rows]

    @property
    def seconds(self) -> float:
        """What looking took in all."""
        return sum(seconds for _, _, seconds in self.rows)
