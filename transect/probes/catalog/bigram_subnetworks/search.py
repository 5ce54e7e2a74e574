"""The search for the subnetwork: soft masks on frozen weights, trained to predict as the bigram table does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Batches, Specimen
from ....errors import NotApplicable, TransectError
from ....forward import Batch, inputs_of, real_positions, to_device
from ....training import Machine, Parametrized, Problem, Run, Schedule, State, train
from .masks import Masks
from .table import BigramTable

ATTEMPTS = 3  # with another order of the text each
BEFORE, RISE, FACTOR = 10, 0.25, 1.25  # a step is a spike above the mean of so many, by so much, or so many times
SETTLED, TENTH = 100, 10  # steps before the end by which it has to be made good; at most a tenth of all


@dataclass(frozen=True)
class Search:
    """masks: what is kept. losses: cross-entropy with the table by step, in nats, before the step. undecided: weights
    between shut and open in the end, over those kept. attempts: how many trainings it took. stable: see `is_stable`."""

    masks: Masks
    losses: Sequence[float]
    undecided: float
    attempts: int
    stable: bool


def is_stable(losses: Sequence[float]) -> bool:
    """Whether the loss never jumps, or comes back each time to where it was, well before the end.

    A jump is a step that exceeds the mean of the ten before it by 0.25 nats, or by a quarter. The paper wants that mean
    reached again 100 steps before the end; of a short training it is a tenth of the steps (ours).
    """
    last = len(losses) - min(SETTLED, len(losses) // TENTH)
    for step in range(1, len(losses)):
        before = losses[max(0, step - BEFORE) : step]
        mean = sum(before) / len(before)
        jumped = losses[step] > mean + RISE or losses[step] > mean * FACTOR
        if jumped and min(losses[step:last], default=mean + 1) > mean:
            return False
    return True


def bigram_loss(model: object, batch: Batch, table: BigramTable) -> tuple[Tensor, int]:
    """Cross-entropy of the model's predictions with the table's (nats), summed over all real positions; their number.

    The last position of a sequence counts too: what follows it is not needed.
    """
    batch = to_device(batch, model.device)  # type: ignore[attr-defined]
    real = real_positions(batch)
    kept = torch.ones_like(batch["input_ids"], dtype=torch.bool) if real is None else real
    logits = model(**inputs_of(model, batch)).logits[kept][:, : table.vocabulary]  # type: ignore[operator]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return table.cross_entropies(batch["input_ids"][kept], wide).sum(), int(kept.sum())


def search(
    specimen: Specimen, text: Batches, table: BigramTable, *, price: float, steps: int, rate: float, sharp: float,
    start: float,
) -> Search:  # fmt: skip
    """Train masks, with the weights frozen, and take them off again. See the probe for the settings.

    Raises NotApplicable where a matrix is not stored by itself, entry by entry.
    """
    for attempt in range(1, ATTEMPTS + 1):
        found = _once(specimen, text, table, attempt, price, steps, rate, sharp, start)
        if found.stable:
            break
    return found


def _once(
    specimen: Specimen, text: Batches, table: BigramTable, attempt: int, price: float, steps: int, rate: float,
    sharp: float, start: float,
) -> Search:  # fmt: skip
    model, losses = specimen.model, []
    settings = {"price": price, "start": start, "sharp": sharp}
    try:
        masked = Parametrized(specimen.anatomy, "continuous-sparsification", settings)
    except TransectError as reason:
        raise NotApplicable(str(reason)) from None
    try:

        def loss(batch: Batch) -> tuple[Tensor, int]:
            summed, count = bigram_loss(model, batch, table)
            losses.append(float(summed.detach()) / count)
            return summed, count

        def no_second_pass() -> Tensor:
            raise RuntimeError("the price of a mask needs no second pass")

        stand_ins = list(masked.stand_ins.values())

        def soften() -> None:
            for one in stand_ins:  # alone: the model stays in evaluation mode, without dropout
                one.train()

        masked.after_step(0, steps)
        problem = Problem(
            "bigram masks", masked.parameters, list(text), loss, None, soften,
            penalty=lambda batch: masked.penalty(no_second_pass),
            after_step=lambda step, optimizer: masked.after_step(step, steps, optimizer),
        )  # fmt: skip
        schedule = Schedule(
            rate, epochs=steps, steps=steps, every=steps, warm_up=0, shape="constant", clip=None,
            options={"weight_decay": 0.01}, seed=specimen.seed + attempt - 1,
        )  # fmt: skip
        train(problem, Run(schedule, Machine(str(model.device)), State(None), specimen.progress), {})
        undecided = masked.told()["undecided over kept"]
        masks = {name: one.hard() for name, one in masked.stand_ins.items()}  # type: ignore[operator]
    finally:
        masked.detach()
    return Search(masks, losses, undecided, attempt, is_stable(losses))
