"""One stage of the training after a conversion, as a paper prescribes it and a user may change it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..anatomy import Anatomy
from ..data import Batches

Train = Literal["full", "lora", "new"]
Lowered = Literal["own", "distill"]
Loss = Callable[[Any, Any, Any], tuple[Tensor, float]]


@dataclass(frozen=True)
class Stage:
    """A training of the converted model.

    train: every number of the blocks ("full"), low-rank updates of matrices that are merged afterwards ("lora"), or
    only parameters whose names match `new` ("new": a regular expression that is searched in the name). also: names of
    parameters that are trained besides the low-rank updates, likewise.
    roles, rank, alpha: of the low-rank updates; roles default to every linear layer of the blocks.
    lr: the largest learning rate. clip: largest norm of a step's gradient.
    lowers: the model's own loss, or the distance from the predictions of the model as it was. loss: in place of these,
    `loss(model, teacher, batch)`, the summed loss and how many terms it has. teacher: whether `loss` reads the model
    as it was; it is None otherwise.
    auxiliary: by what the losses are multiplied that parts leave in `auxiliary` when they are run (see `losses_of`).
    share: of the steps. keeps: the state with the best held-out loss, or the last one, where that loss does not know of
    all that the stage lowers.
    begin, end: called with the model's anatomy before the stage, and after it, also after an error.
    learn: called with it and the training data after `begin`, also where the stage is taken from an earlier run: for
    what is no parameter, and is found out on text.
    step: called with it, the number of steps done and of all, before each batch that is trained on; torch's random
    numbers are then those of the step, also after an interruption.
    measured: called with it before the held-out loss is taken.
    judged: in place of the model's own held-out loss, what the best state has least of, as `loss` gives it, without
    gradients.
    rates: factors of the learning rate for parameters whose names match a pattern, the first that does; 1 for others.
    within: called with it and whether a batch is trained on; contexts in each of which the model is then run. Losses
    that are trained on are summed, held-out ones averaged. Random numbers are those of the step, as with `step`.
    """

    name: str
    train: Train = "full"
    new: str = ""
    also: str = ""
    roles: Sequence[str] | None = None
    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-4
    clip: float | None = 1.0
    lowers: Lowered = "own"
    loss: Loss | None = None
    teacher: bool = False
    auxiliary: float = 1.0
    share: float = 1.0
    keeps: Literal["best", "last"] = "best"
    begin: Callable[[Anatomy], None] | None = None
    learn: Callable[[Anatomy, Batches], None] | None = None
    end: Callable[[Anatomy], None] | None = None
    step: Callable[[Anatomy, int, int], None] | None = None
    measured: Callable[[Anatomy], None] | None = None
    judged: Loss | None = None
    rates: Sequence[tuple[str, float]] = ()
    within: Callable[[Anatomy, bool], Sequence[AbstractContextManager[Any]]] | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the model as it was is needed."""
        return self.teacher or (self.loss is None and self.lowers == "distill")

    def trains(self, name: str, pattern: str) -> bool:
        """Whether a parameter's name matches a pattern; none matches an empty one."""
        return bool(pattern) and re.search(pattern, name) is not None

    def rates_of(self, names: Iterable[str]) -> dict[str, float]:
        """The factor of each parameter's learning rate, for those that have one."""
        found = {name: next((rate for pattern, rate in self.rates if re.search(pattern, name)), None) for name in names}
        return {name: rate for name, rate in found.items() if rate is not None}
