"""Claims of AlgoFormer (Gao et al., 2024, arXiv:2402.13572)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch

from ...anatomy import Anatomy
from ...contest.parts.judging import judged, loss_on, means_over, scores_of
from ...contest.parts.sizes import built, flops_of_model
from ...conversion.catalog.algoformer import order_of
from ...evaluation import parameters
from ...tasks import task_named
from ..context import Context
from ..descent import descend
from ..pairs import over_seeds, paired
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2402.13572"
SIZES: dict[str, Any] = {"hidden": 64, "blocks": 3, "heads": 2, "neurons": 128, "vocabulary": 1}
TASK: dict[str, Any] = {"dimensions": 2, "points": 10, "noise": 0.0, "features": 3}
OTHER_TASKS: dict[str, dict[str, Any]] = {
    "icl-autoregression": {"order": 2, "points": 24, "noise": 0.0, "features": 4},
    "icl-chain": {"dimensions": 2, "points": 8, "steps": 2, "hidden": 2},
}
TURNS = 8
OTHERS = (4, 12, 18)  # turns with which the trained loop is run besides
ORDERS = {"algoformer": order_of(3, [1], TURNS), "loop of all": order_of(3, [0, 1, 2], 3), "no loop": [0, 1, 2]}
STEPS, BATCH, RATE, SEEDS = 250, 32, 3e-3, (0, 1, 2, 3, 4)
TESTED = 512
PLAIN: dict[str, Any] = {"dimensions": 2, "points": 16, "noise": 0.0}  # in the inputs themselves, which the loop solves
LONG_STEPS, LONG_SEEDS, FEWEST = 800, (0, 1, 2), 4  # turns of which the loss is, from that number to TURNS
RUN = (1, 2, 4, 6, TURNS, TURNS + 10)
NEAR = 0.05  # of the answers' variance


@claim(
    "algoformer/features",
    method="algoformer",
    paper=PAPER,
    statement="On regression in the features of a fixed network, from examples in the prompt, one block before a loop "
    "of one and one behind it have a smaller error than a plain loop of three blocks with as many parameters.",
)
def features(context: Context) -> Result:
    """Scaled down: width 64, inputs of 2 dimensions in 3 features, 10 examples, no noise; 250 steps of 32 prompts.

    The loop of one block has 8 turns, that of three 3, so that both run about as many blocks (10 and 9); the three
    blocks without a loop stand beside them and are not judged; smaller is by two standard errors over seeds. The loss
    is that of the last turn's answers (`algoformer/more-turns` has one over the last turns). The model plays no part.
    """
    rows, difference, error, told = _compared("icl-regression", TASK)
    longer = ", ".join(
        f"{fmean(row[_turned(times)] for row in rows if row['model'] == 'algoformer'):.4f} after {times}"
        for times in OTHERS
    )
    return Result(
        Verdict.of(difference + 2 * error < 0),
        f"Squared error over all examples, in units of the answers' variance, {len(SEEDS)} seeds: {told}. With another "
        f"number of turns than the {TURNS} that were trained, algoformer's is {longer}",
        rows,
    )


@claim(
    "algoformer/sequences-and-chains",
    method="algoformer",
    paper=PAPER,
    statement="On sequences that go on by a rule in features of their last numbers, and on networks that are read off "
    "examples of all their steps, one block before a loop of one and one behind it have a smaller error than a plain "
    "loop of three blocks with as many parameters.",
)
def sequences_and_chains(context: Context) -> Result:
    """The models and the training of the claim before, on 24 numbers, each by the last 2 in 4 features, and on 8 chains
    of 2 steps, each of 2 numbers; no noise. Smaller on both."""
    found = {name: _compared(name, settings) for name, settings in OTHER_TASKS.items()}
    return Result(
        Verdict.of(all(difference + 2 * error < 0 for _, difference, error, _ in found.values())),
        f"Squared error over all answers, {len(SEEDS)} seeds: "
        + ". ".join(f"{name}: {told}" for name, (*_, told) in found.items()),
        [row for rows, *_ in found.values() for row in rows],
    )


@claim(
    "algoformer/least-squares",
    method="algoformer",
    paper=PAPER,
    statement="On linear regression without noise, from examples in the prompt, the error of a trained loop nears that "
    "of least squares, which is 0, once there are more examples than dimensions.",
)
def least_squares(context: Context) -> Result:
    """Inputs of 2 dimensions, 16 examples, 800 steps of 32 prompts; near is within 5 % of the answers' variance at the
    last example, in the mean over seeds with two standard errors. The loss is that over the last turns (see the next
    claim); that of the last turn alone stands beside it. The model plays no part."""
    found = _solvers(context)
    rows, others = found["last turns"], found["last turn"]
    by = {count: fmean(row["by"][str(count)] for row in rows) for count in range(1, PLAIN["points"] + 1)}
    last = over_seeds([row["by"][str(PLAIN["points"])] for row in rows])
    told = ", ".join(f"{by[count]:.3f} of example {count}" for count in by if count in (1, 2, 3, 4, 8, PLAIN["points"]))
    return Result(
        Verdict.of(last.mean + 2 * last.error < NEAR),
        f"Squared error in units of the answers' variance, {len(rows)} seeds, {TURNS} turns: {told} (the last "
        f"{last}); least squares has 0 from example {PLAIN['dimensions'] + 1} on. With the loss of the "
        f"last turn alone, of the last example {over_seeds([row['by'][str(PLAIN['points'])] for row in others])}",
        [*rows, *others],
    )


@claim(
    "algoformer/more-turns",
    method="algoformer",
    paper=PAPER,
    statement="A loop that is trained with the loss over its last turns loses nothing by any more turns up to those "
    "that were trained, and stays stable ten turns beyond them, where one that is trained on its last turn does not.",
)
def more_turns(context: Context) -> Result:
    """The loops of the claim before, of 4 to 8 turns in training: each step draws one of them, whose mean is the loss
    over the last turns (how many those are in the paper is not known to us). Stable is an error that is not twice that
    of the turns that were trained."""
    found = _solvers(context)
    errors = {name: {turns: [row[_turned(turns)] for row in rows] for turns in RUN} for name, rows in found.items()}
    falls = [
        difference - 2 * error < 0
        for more, fewer in zip(RUN[1:-1], RUN, strict=False)
        for difference, error in [paired(errors["last turns"][more], errors["last turns"][fewer])]
    ]
    grown = {name: fmean(each[RUN[-1]]) / fmean(each[TURNS]) for name, each in errors.items()}
    told = "; ".join(
        f"{name} {', '.join(f'{fmean(of):.3f} after {turns}' for turns, of in each.items())}"
        for name, each in errors.items()
    )
    return Result(
        Verdict.of(all(falls) and grown["last turns"] < 2 <= grown["last turn"]),
        f"Squared error over all examples, in units of the answers' variance, {len(LONG_SEEDS)} seeds, by the turns "
        f"that are run, of which {TURNS} were trained: {told}",
        [row for rows in found.values() for row in rows],
    )


def _solvers(context: Context) -> dict[str, list[dict[str, Any]]]:
    """Of loops that are trained with a loss over the last turns, and on the last one: a row for each seed."""
    if "algoformer" not in context.shared:
        context.shared["algoformer"] = {
            name: [{"loss of the": name, "seed": seed, **_solver(fewest, seed)} for seed in LONG_SEEDS]
            for name, fewest in (("last turns", FEWEST), ("last turn", TURNS))
        }
    return context.shared["algoformer"]


def _solver(fewest: int, seed: int) -> dict[str, Any]:
    """The errors, with some numbers of turns, of a loop that is trained with so many at least, TURNS at most."""
    asked = task_named("icl-regression").draw(TESTED, 1, PLAIN)
    turns = torch.randint(fewest, TURNS + 1, (LONG_STEPS,), generator=torch.Generator().manual_seed(seed)).tolist()
    model = _trained(ORDERS["algoformer"], "icl-regression", PLAIN, LONG_STEPS, seed, lambda step: turns[step])
    found: dict[str, Any] = {}
    for times in RUN:
        _turn(model, times)
        scores = scores_of(model, asked, BATCH)
        found[_turned(times)] = float(scores.nanmean())
        if times == TURNS:
            found["by"] = means_over(asked, scores)
    return found


def _turn(model: Any, times: int) -> None:
    """The middle one of three blocks is run so many times."""
    anatomy = Anatomy(model)
    anatomy.arrange([0, *[1] * times, len(anatomy.blocks) - 1])


def _turned(times: int) -> str:
    return f"loss with {times} turns"


def _compared(task: str, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], float, float, str]:
    """Rows of all models; by how much algoformer's error is the larger of the two loops', with its error; in words."""
    rows = [
        {"task": task, "model": name, "seed": seed, **_judged(name, seed, task, settings)}
        for name in ORDERS
        for seed in SEEDS
    ]
    found = {name: [row["loss"] for row in rows if row["model"] == name] for name in ORDERS}
    asked, known = task_named(task).draw(TESTED, 1, settings), task_named(task)
    scores = known.baselines(asked, **known.settings(settings))  # type: ignore[misc]
    best = {name: float(score[asked.asked].mean()) for name, score in scores.items()}
    difference, error = paired(found["algoformer"], found["loop of all"])
    told = ", ".join(f"{name} {fmean(each):.4f}" for name, each in found.items())
    told += f" (algoformer against the loop of all {difference:+.4f} ± {error:.4f}); least squares on what the rule is "
    told += f"linear in {best['least squares']:.4f}, the answer 0 {best['nothing']:.4f}"
    return rows, difference, error, told


def _judged(name: str, seed: int, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The errors of a model whose blocks stand in the order of that name, and what it costs."""
    asked = task_named(task).draw(TESTED, 1, settings)
    model = _trained(ORDERS[name], task, settings, STEPS, seed)
    found: dict[str, Any] = {
        "loss": judged(model, asked, BATCH).loss, "parameters": parameters(model), "blocks run": len(ORDERS[name]),
        "operations": flops_of_model(model, asked.inputs.shape[1]),
    }  # fmt: skip
    for times in OTHERS if name == "algoformer" and task == "icl-regression" else ():
        _turn(model, times)
        found[_turned(times)] = judged(model, asked, BATCH).loss
    return found


def _trained(
    order: list[int], task: str, settings: dict[str, Any], steps: int, seed: int,
    turns: Callable[[int], int] | None = None,
) -> Any:  # fmt: skip
    """A model of three blocks that are run in this order, trained from new weights. turns: of the loop, by steps."""
    shown = task_named(task).draw(steps * BATCH, 2 * seed, settings)
    model = built("llama", {}, {}, {**SIZES, "length": shown.inputs.shape[1]}, shown.vectors, seed)
    Anatomy(model).arrange(order)
    batches, lowered = list(shown.batches(BATCH)), loss_on(model, shown)

    def loss(step: int) -> torch.Tensor:
        if turns is not None:
            _turn(model, turns(step))
        summed, count = lowered(batches[step])
        return summed / count

    descend(model, loss, steps, RATE)
    return model
