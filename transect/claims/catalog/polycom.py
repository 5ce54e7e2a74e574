"""Claims of PolyCom (Zhuo et al., ICLR 2025, arXiv:2411.03884)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from torch import nn

from ...anatomy import Anatomy
from ...parts import build_model
from ..context import Context, Measured
from ..on_text import measured_on_text, text_length, trained_on_text
from ..pairs import over_seeds
from ..parts_from_scratch import SIZES
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2411.03884"
STEPS, SEEDS = 300, (0, 1, 2)
NEURONS, GATED = 256, 171  # of two matrices, and of three of as many numbers
FUNCTIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


@claim(
    "polycom/below-others",
    method="polycom",
    paper=PAPER,
    statement="Trained from scratch with as many numbers, MLPs with PolyNorm reach a loss no higher than with "
    "PolyReLU, and each of them a lower one than with ReLU, GELU or SwiGLU.",
)
def below_others(context: Context) -> Result:
    """Scaled down: a Llama of width 64 and two blocks, 300 steps. SwiGLU has three matrices of fewer neurons, the
    others two. The same start of all else, data and order of a seed for all."""
    numbers, told, held = [], [], []
    for ours, theirs in (
        ("poly-norm", "poly-relu"),
        *((one, other) for one in ("poly-norm", "poly-relu") for other in ("relu", "gelu", "swiglu")),
    ):
        row, found = _beside(context, (ours, 3), (theirs, 3))
        numbers.append(row)
        held.append(found.mean <= 0 if theirs == "poly-relu" else found.lower)
        told += [] if held[-1] else [f"{ours} against {theirs} {found}"]
    return Result(
        Verdict.of(all(held)),
        f"{sum(held)} of {len(held)} comparisons are as said, after {STEPS} steps, over {len(SEEDS)} seeds"
        + (f"; not: {', '.join(told)} (difference ± standard error over seeds)" if told else ""),
        numbers,
    )


@claim(
    "polycom/order",
    method="polycom",
    paper=PAPER,
    statement="With PolyNorm of order 3 the loss is lower than with order 2, and order 4 brings less than that.",
)
def order(context: Context) -> Result:
    """The models of the claim before, and two of other orders."""
    (row, third), (other, fourth) = (
        _beside(context, ("poly-norm", 3), ("poly-norm", 2)), _beside(context, ("poly-norm", 4), ("poly-norm", 3))
    )  # fmt: skip
    return Result(
        Verdict.of(third.lower and fourth.mean > third.mean),
        f"Order 3 against 2: {third}; 4 against 3: {fourth} (difference of the losses ± standard error over "
        f"{len(SEEDS)} seeds, after {STEPS} steps)",
        [row, other],
    )


def _beside(context: Context, ours: tuple[str, int], theirs: tuple[str, int]) -> tuple[dict[str, Any], Any]:
    """Two ways compared, seed by seed, as a row and over the seeds."""
    pairs = [(_measured(context, *ours, seed), _measured(context, *theirs, seed)) for seed in SEEDS]
    (_, count), (_, other) = pairs[0]
    differences = [one.minus(two)[0] for (one, _), (two, _) in pairs]
    found = over_seeds(differences)
    named = [f"{name}, order {r}" if name.startswith("poly") else name for name, r in (ours, theirs)]
    return {
        "ours": named[0], "theirs": named[1], "our_numbers": count, "their_numbers": other,
        "our_loss": fmean(one.loss for (one, _), _ in pairs), "their_loss": fmean(one.loss for _, (one, _) in pairs),
        "difference": found.mean, "error_over_seeds": found.error, "lower_seeds": sum(one < 0 for one in differences),
    }, found  # fmt: skip


def _measured(context: Context, name: str, power: int, seed: int) -> tuple[Measured, int]:
    """Held-out loss of a training, and how many numbers the model has; each is trained once for all claims."""
    kept = context.shared.setdefault("polycom", {})
    if (name, power, seed) not in kept:
        sizes = SIZES | {"vocabulary": context.anatomy.config.vocab_size, "length": text_length(context)}
        if name == "swiglu":
            model = build_model("llama", seed=seed, neurons=GATED, **sizes)
        else:
            part = "poly-relu" if name in FUNCTIONS else name
            model = build_model(
                "llama", parts={"mlp": part}, settings={part: {"order": power}}, seed=seed, neurons=NEURONS, **sizes
            )
        for block in Anatomy(model).blocks if name in FUNCTIONS else ():
            block.part("mlp").polynomial = FUNCTIONS[name]()
        model = trained_on_text(context, model, STEPS, seed)
        kept[name, power, seed] = measured_on_text(context, model), sum(one.numel() for one in model.parameters())
    return kept[name, power, seed]
