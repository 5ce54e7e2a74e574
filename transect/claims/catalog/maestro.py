"""Claim of Maestro (Horváth et al., ICML 2024, arXiv:2308.14929)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ...data.split import split
from ...forward import Batch, at_rest
from ...training import Machine, Parametrized, Problem, Run, Schedule, State, held_out_loss, own_loss, train
from ...training.parametrizations.maestro import Ordered
from ..context import Context, Measured
from ..registry import Result, Verdict, claim

STEPS = 60
BATCH = 4  # sequences in a step
RATES = (1e-3, 3e-3)  # each way's best is taken
SHARES = (1.0, 0.5, 0.25)  # of every matrix's components
JUDGED = 0.5
HELD_OUT = 0.1
ORDERED, PLAIN, DENSE = "sampled prefixes", "factors", "dense, then SVD"
_WAYS: dict[str, dict[str, Any]] = {ORDERED: {}, PLAIN: {"lasso": 0.0, "sample": False}}


@claim(
    "maestro/half-rank",
    method="maestro",
    paper="arXiv:2308.14929",
    statement="Cutting factors that were trained with sampled prefixes to half their rank costs less than cutting "
    "factors that were trained without, and no more than SVD of a dense model that was trained alike.",
)
def half_rank(context: Context) -> Result:
    """Every matrix at the same share of its components, without any training afterwards.

    All begin with the trained model and take as many steps on the same sequences of calibration data in the same order,
    and end as the last step leaves them; by the loss at half the rank on its last tenth each way's rate is chosen. The
    losses are those of held-out data, errors over its sequences, in pairs. One seed. Cost is what the cut adds to each
    way's own loss. A quarter of the rank is our addition, and not judged; so are the trained factors' product, cut by
    SVD, and the model before training, cut by SVD.
    """
    context.require_language_model()
    found: dict[str, tuple[dict[float, Measured], float]] = {}
    for way in (ORDERED, PLAIN, DENSE):
        _, parametrized, rate = min((_trained(context, way, rate) for rate in RATES), key=lambda tried: tried[0])
        found[way] = _cut(context, parametrized), rate
        if way == PLAIN:
            parametrized.finish()
            found[f"{PLAIN}, then SVD"] = _cut(context, Parametrized(parametrized.anatomy, "maestro")), rate
    found["untrained, then SVD"] = _cut(context, Parametrized(context.fresh().anatomy, "maestro")), 0.0
    rows = [_row(way, share, found[way], found[ORDERED][0]) for way in found for share in SHARES]
    costs = {row["trained as"]: row["cost"] for row in rows if row["share of the rank"] == JUDGED}
    held = costs[ORDERED] < costs[PLAIN] and costs[ORDERED] <= costs[DENSE]
    told = ", ".join(f"{way} {found[way][0][JUDGED].loss:.4f} ({costs[way]:+.4f})" for way in found)
    return Result(
        Verdict.of(held),
        f"Loss at half the rank, and what the cut costs, from {context.dense.loss:.4f}: {told}",
        rows,
    )


def _row(
    way: str, share: float, found: tuple[dict[float, Measured], float], ordered: dict[float, Measured]
) -> dict[str, Any]:
    by_share, rate = found
    difference, error = ordered[share].minus(by_share[share])
    return {
        "trained as": way, "rate": rate, "share of the rank": share, "loss": by_share[share].loss,
        "cost": by_share[share].minus(by_share[1.0])[0], "sampled minus this": difference, "standard error": error,
    }  # fmt: skip


@contextmanager
def _share(parametrized: Parametrized, share: float) -> Iterator[None]:
    """Inside the `with` so much of every matrix's rank is used."""
    with ExitStack() as stack:
        for one in parametrized.stand_ins.values():
            assert isinstance(one, Ordered)
            stack.enter_context(one.limited(one.prefix(share)))
        yield


def _cut(context: Context, parametrized: Parametrized) -> dict[float, Measured]:
    """The held-out loss with so much of every matrix's rank."""
    found = {}
    for share in SHARES:
        with _share(parametrized, share):
            found[share] = context.evaluate(parametrized.base, 1.0)
    return found


def _trained(context: Context, way: str, rate: float) -> tuple[float, Parametrized, float]:
    """Factors after training that way: the loss at half the rank by which the rate is chosen, and they with the rate.

    Of the dense model they are those of the trained weights.
    """
    from ...adaptation.attached import Attached, Replaced  # peft takes a second to import

    anatomy = context.fresh().anatomy
    model, machine = anatomy.model, Machine(str(context.model.device))
    training, judging = split(context.calibration, HELD_OUT, BATCH, 0)
    with at_rest(model, frozen=True):
        attached = Attached(model, None, 0) if way == DENSE else Replaced(anatomy, "maestro", _WAYS[way])

        def penalty(batch: Batch) -> Tensor | None:
            def again() -> Tensor:
                loss, count = own_loss(model, batch)
                return loss / count

            return attached.penalty(again)

        problem = Problem(
            way, attached.parameters, list(training), loss=lambda batch: own_loss(model, batch), measure=None,
            set_mode=model.train, penalty=penalty, held=attached.held, put_back=attached.put_back,
            after_step=lambda step, optimizer: attached.after_step(step, STEPS, optimizer),
        )  # fmt: skip
        schedule = Schedule(rate, epochs=STEPS, steps=STEPS)
        train(problem, Run(schedule, machine, State(None), context.progress), {})
        factors = attached if isinstance(attached, Replaced) else Parametrized(anatomy, "maestro")
        with _share(factors, JUDGED):
            return held_out_loss(model, judging, machine), factors, rate
