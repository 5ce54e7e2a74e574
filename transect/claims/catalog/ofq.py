"""Claims of oscillation-free quantization (Liu, Liu and Cheng, ICML 2023, arXiv:2302.02210)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from ...data.split import split
from ...training import Machine, Parametrized, Problem, Run, Schedule, State, own_loss, train
from ..context import Context, Measured
from ..registry import Result, Verdict, claim

STEPS = 100
ANNEALED = 60  # further steps, in which only weights near a boundary move
TUNED = 40  # steps at 8 bits
BATCH = 4  # sequences in a step
RATE = 5e-4  # the method's own, held constant: weights must not come to rest because steps get small
BITS = 2


@claim(
    "ofq/oscillation",
    method="ofq",
    paper="arXiv:2302.02210",
    statement="In training at 2 bits fewer weights go to and fro under StatsQ than under LSQ with a learned step for "
    "each row; after confidence-guided annealing fewer still, and the loss is not higher than before it.",
)
def oscillation(context: Context) -> Result:
    """All matrices, weights alone; 100 steps at one rate that stays as it is, and for StatsQ 60 more of annealing.

    A weight goes to and fro if it turned back in more than 2 % of the last steps (an exponential average with momentum
    0.01). Trained on calibration data; losses are those of held-out data, with errors over its sequences, in pairs.
    """
    context.require_language_model()
    plain = _trained(context, {"bits": BITS, "annealing": ANNEALED / (STEPS + ANNEALED)}, STEPS + ANNEALED, (STEPS,))
    other = _trained(context, {"bits": BITS, "weights": "lsq", "annealing": 0.0}, STEPS)
    found = {"StatsQ": plain[STEPS], "LSQ": other[STEPS], "StatsQ, annealed": plain[STEPS + ANNEALED]}
    rows: list[dict[str, Any]] = [
        {"weights": name, "share that goes to and fro": share, "loss": measured.loss}
        for name, (share, measured) in found.items()
    ]
    ours, theirs, annealed = (row["share that goes to and fro"] for row in rows)
    rise, error = found["StatsQ, annealed"][1].minus(found["StatsQ"][1])
    rows[2] |= {"above StatsQ": rise, "standard error": error}
    against = [
        said for said, wrong in {
            "StatsQ has no fewer than LSQ": ours >= theirs, "annealing leaves no fewer": annealed >= ours,
            f"annealing raises the loss by {rise:.4f} ± {error:.4f}": rise > 0,
        }.items() if wrong
    ]  # fmt: skip
    told = ", ".join(f"{name} {share:.2%} (loss {measured.loss:.4f})" for name, (share, measured) in found.items())
    return Result(
        Verdict.DOES_NOT_HOLD if against else Verdict.HOLDS,
        f"Of all weights go to and fro: {told}; dense loss {context.dense.loss:.4f}."
        + "".join(f" {said[0].upper()}{said[1:]}." for said in against),
        rows,
    )


@claim(
    "ofq/eight-bits",
    method="ofq",
    paper="Transect's own",
    statement="At 8 bits a weight a model is within 0.5 % of the dense loss after a short tuning.",
)
def eight_bits(context: Context) -> Result:
    """40 steps on calibration data; losses of held-out data, error over its sequences, in pairs."""
    context.require_language_model()
    _, measured = _trained(context, {"bits": 8}, TUNED)[TUNED]
    rise, error = measured.minus(context.dense)
    share = rise / context.dense.loss
    return Result(
        Verdict.of(share <= 0.005),
        f"{measured.loss:.4f} against {context.dense.loss:.4f} ± {error:.4f}: {share:+.2%}",
        [{"loss": measured.loss, "dense": context.dense.loss, "above": rise, "standard error": error}],
    )


def _trained(
    context: Context, settings: Mapping[str, Any], steps: int, looks: tuple[int, ...] = ()
) -> dict[int, tuple[float, Measured]]:
    """The share of weights that go to and fro, and the loss as stored, by the step: at `looks` and the end."""
    anatomy = context.fresh().anatomy
    model = anatomy.model
    batches = list(split(context.calibration, 0.1, BATCH, 0)[0])
    attached = Parametrized(anatomy, "ofq", {**settings, "probe": True})
    found: dict[int, tuple[float, Measured]] = {}

    def look(step: int) -> None:
        (share,) = attached.told().values()
        found[step] = share, context.evaluate(model, 1.0)

    def after(step: int, optimizer: Optimizer) -> None:
        attached.after_step(step, steps, optimizer)
        if step in (*looks, steps):
            look(step)

    problem = Problem(
        "ofq", attached.parameters, batches, loss=lambda batch: own_loss(model, batch), measure=None,
        set_mode=model.train, after_step=after, held=attached.held, put_back=attached.put_back,
    )  # fmt: skip
    schedule = Schedule(RATE, epochs=math.ceil(steps / len(batches)), steps=steps, every=steps, shape="constant")
    attached.after_step(0, steps)
    train(problem, Run(schedule, Machine(str(model.device)), State(None), context.progress), {})
    return found
