"""Claims of m2mKD (Lo et al. 2024, arXiv:2402.16918)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ...anatomy import Anatomy
from ...conversion import Plan, convert_anatomy
from ...conversion.catalog.m2mkd import SHARES
from ...data import Batches
from ...training import own_loss
from ..context import Context
from ..descent import descend
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

STEPS, BATCH, LENGTH, RATE = 300, 8, 64, 1e-3  # of all stages together; sequences in a step; tokens of a sequence
SETTINGS: dict[str, Any] = {"modules": 4, "width": 64}


@claim(
    "m2mkd/better-start",
    method="m2mkd",
    paper="arXiv:2402.16918",
    statement="After as many steps end to end, a mixture of experts whose modules were distilled one by one has a "
    "lower loss than one from random numbers, than one whose modules learned without the teacher, and than one that "
    "was distilled as a whole.",
)
def better_start(context: Context) -> Result:
    """Scaled down: text in place of images, four modules of one block, 4 experts; one seed. What the modules' turns and
    the host cost is not made up for, as in the paper: only the steps end to end are equal."""
    context.specimen.require_causal()
    blocks = len(context.anatomy.blocks)
    if blocks < 2:
        raise NotApplicable("the model has one block and cannot be cut into modules")
    settings = SETTINGS | {"modules": min(SETTINGS["modules"], blocks)}
    rows, source = fresh_rows(context, STEPS * BATCH * LENGTH)
    length = min(LENGTH, max(map(len, rows)))
    data = batches_of(cut(rows, length, STEPS * BATCH), BATCH)
    ways = {
        "module by module": {}, "without the teacher": {"alpha": 0.0},
        "as a whole": {"modules": 1, "depth": settings["modules"]},
    }  # fmt: skip
    found = {way: context.evaluate(_converted(context, data, settings | more), 1.0) for way, more in ways.items()}
    found["random"] = context.evaluate(_from_random(context, data, settings), 1.0)
    best, *others = found
    table = []
    for way, one in found.items():
        difference, error = found[best].minus(one)
        table.append({"begun": way, "loss": one.loss, "difference": difference, "standard_error": error})
    beaten = [way for way in others if found[best].loss < found[way].loss]
    told = ", ".join(f"{way} {one.loss:.3f}" for way, one in found.items())
    return Result(
        Verdict.of(len(beaten) == len(others)),
        f"Held-out loss after {_last(STEPS)} steps end to end (of {STEPS} in all; random: those alone): {told}. The "
        f"teacher's is {context.dense.loss:.3f}. Trained on {source}.",
        table,
    )


def _last(steps: int) -> int:
    """The steps end to end."""
    return max(1, round((1 - sum(SHARES)) * steps))


def _converted(context: Context, data: Batches, settings: dict[str, Any], steps: int | None = None) -> Any:
    teacher = Anatomy(copy.deepcopy(context.model).float())
    plan = Plan(
        "m2mkd", settings, steps=STEPS if steps is None else steps, epochs=10, lr=RATE, batch_size=BATCH, held_out=0.05
    )
    return convert_anatomy(teacher, plan, data)[0]


def _from_random(context: Context, data: Batches, settings: dict[str, Any]) -> Any:
    """The same student, trained end to end alone, on as many batches."""
    model = _converted(context, data, settings, steps=0).requires_grad_(True)
    batches = list(data)

    def loss(step: int) -> Tensor:
        lowered, count = own_loss(model, batches[step % len(batches)])
        return lowered / count

    descend(model, loss, _last(STEPS), RATE, weight_decay=0.0, warm_up=0.05)
    return model
