"""Claims of KAT (Yang & Wang, ICLR 2025, arXiv:2409.10594)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...anatomy import Anatomy
from ...conversion import Plan, convert_anatomy
from ...data import Batches
from ...parts import build_model
from ...parts.catalog.kat import COEFFICIENTS, Rational
from ..context import Context, Measured
from ..on_text import measured_on_text, text_length, trained_on_text
from ..pairs import over_seeds
from ..parts_from_scratch import BATCH, SIZES
from ..registry import Result, Verdict, claim
from ..scratch import batches_of, cut

PAPER = "arXiv:2409.10594"
STEPS, TUNED, SEEDS, NEURONS = 400, 200, (0, 1, 2), 256
FITTED = 32  # sequences to which functions are fitted
NEAR = 0.01  # share of the loss
OTHER = "of the other form"
# The released coefficients that are named gelu. They were fitted as P / (1 + |Σ b_j x^j|), and are evaluated as
# P / (1 + Σ |b_j| |x|^j).
MISMATCHED = (
    (-0.00153969, 0.516929, 0.440758, 0.0972553, -0.00884418, -0.00378675),
    (-0.141711, -0.0648123, -0.0444695, 0.0128378),
)


@claim(
    "kat/start",
    method="kat",
    paper=PAPER,
    statement="A trained model with GELU that is converted has, before any training, a held-out loss within 1 % of the "
    "one it had.",
)
def start(context: Context) -> Result:
    """A GPT-2 of width 64 and two blocks, trained for 400 steps, with the function fitted to its values, fitted on
    [-3, 3], and with the published coefficients. Largest error on [-3, 3] and gain 1 / E[F(x)²], x ~ N(0, 1), stand
    beside."""
    rows = [row for row in _started(context) if row["coefficients"] != OTHER]
    return Result(Verdict.of(all(abs(row["share"]) < NEAR for row in rows)), _largest(rows), rows)


@claim(
    "kat/other-form",
    method="kat",
    paper="Transect's own",
    statement="The released coefficients that are named gelu, which were fitted in another form than the one they are "
    "evaluated in, take the held-out loss of a converted model with GELU by more than 1 % from what it was.",
)
def other_form(context: Context) -> Result:
    """The models of the claim before."""
    rows = [row for row in _started(context) if row["coefficients"] == OTHER]
    return Result(Verdict.of(all(abs(row["share"]) > NEAR for row in rows)), _largest(rows), rows)


def _largest(rows: list[dict[str, Any]]) -> str:
    ways = dict.fromkeys(row["coefficients"] for row in rows)
    largest = {way: max((row["share"] for row in rows if row["coefficients"] == way), key=abs) for way in ways}
    return "Largest change of the loss: " + ", ".join(f"{way} {share:.3%}" for way, share in largest.items())


def _started(context: Context) -> list[dict[str, Any]]:
    """The loss right after each conversion, by seed."""
    kept = context.shared.setdefault("kat/start", [])
    for seed in SEEDS if not kept else ():
        model = _gelu(context, seed)
        before = measured_on_text(context, model)
        for way, data, coefficients in (
            ("fitted to the text", _text(context), None), ("fitted on [-3, 3]", None, None),
            ("published", None, COEFFICIENTS["gelu"][:2]), (OTHER, None, MISMATCHED),
        ):  # fmt: skip
            made = _converted(model, data, coefficients)
            found = measured_on_text(context, made)
            difference, error = found.minus(before)
            kept.append({"seed": seed, "coefficients": way, "loss_before": before.loss, "loss": found.loss,
                         "share": difference / before.loss, "standard_error": error / before.loss,
                         **_of_function(Anatomy(made).blocks[0].part("mlp").between)})  # fmt: skip
    return kept


@claim(
    "kat/from-conversion",
    method="kat",
    paper=PAPER,
    statement="After as many steps, a model whose MLPs are GR-KANs has a lower loss if it began as a trained one than "
    "from random numbers, and one no higher than the trained one trained as long itself.",
)
def from_conversion(context: Context) -> Result:
    """The GPT-2 of the claim before; all are trained for 200 steps on text that it was not trained on."""
    numbers = []
    for seed in SEEDS:
        model = _gelu(context, seed)
        converted, again, scratch = (
            measured_on_text(context, trained_on_text(context, one, TUNED, seed, skipped=STEPS))
            for one in (
                _converted(model, _text(context), None), copy.deepcopy(model), _made(context, seed, {"mlp": "kat"})
            )
        )  # fmt: skip
        numbers.append({"seed": seed, "converted": converted.loss, "scratch": scratch.loss, "trained_on": again.loss,
                        **_minus("scratch", converted, scratch), **_minus("trained_on", converted, again)})  # fmt: skip
    above = over_seeds([row["minus_scratch"] for row in numbers])
    beside = over_seeds([row["minus_trained_on"] for row in numbers])
    return Result(
        Verdict.of(above.lower and beside.mean <= 2 * beside.error),
        f"Converted minus from scratch: {above}; minus the trained one, trained on: {beside} (differences of the "
        f"losses ± standard error over {len(SEEDS)} seeds, after {TUNED} steps)",
        numbers,
    )


@claim(
    "kat/from-scratch",
    method="kat",
    paper=PAPER,
    statement="Trained from scratch, a model whose MLPs are GR-KANs reaches a lower loss than one of equal width with "
    "GELU.",
)
def from_scratch(context: Context) -> Result:
    """Width 64, two blocks, 400 steps; GR-KANs begin as the identity and swish, with the variance kept."""
    numbers = []
    for seed in SEEDS:
        gelu = measured_on_text(context, _gelu(context, seed))
        kat = measured_on_text(context, trained_on_text(context, _made(context, seed, {"mlp": "kat"}), STEPS, seed))
        numbers.append({"seed": seed, "kat": kat.loss, "gelu": gelu.loss, **_minus("gelu", kat, gelu)})
    found = over_seeds([row["minus_gelu"] for row in numbers])
    return Result(
        Verdict.of(found.lower),
        f"The difference of the losses is {found} (standard error over {len(SEEDS)} seeds) after {STEPS} steps",
        numbers,
    )


def _minus(name: str, one: Measured, other: Measured) -> dict[str, float]:
    difference, error = one.minus(other)
    return {f"minus_{name}": difference, f"standard_error_{name}": error}


def _made(context: Context, seed: int, parts: dict[str, str] | None = None) -> Any:
    """A new GPT-2, without dropout, which its own MLPs have and parts have not."""
    model = build_model(
        "gpt2", parts=parts, seed=seed, neurons=NEURONS, vocabulary=context.anatomy.config.vocab_size,
        length=text_length(context), **SIZES,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _gelu(context: Context, seed: int) -> Any:
    """The trained model with GELU, which no claim changes."""
    kept = context.shared.setdefault("kat", {})
    if seed not in kept:
        kept[seed] = trained_on_text(context, _made(context, seed), STEPS, seed)
    return kept[seed]


def _text(context: Context) -> Batches:
    """What the functions are fitted to, in sequences that the model can read."""
    return batches_of(cut(list(context.calibration.texts()), text_length(context), FITTED), BATCH)


def _converted(model: Any, data: Any, coefficients: Any) -> Any:
    """A copy with GR-KANs, untrained, fitted or with these coefficients."""
    anatomy = Anatomy(copy.deepcopy(model))
    made = convert_anatomy(anatomy, Plan("kat", steps=0), data)[0]
    if coefficients is not None:
        for block in Anatomy(made).blocks:
            _set(block.part("mlp").between, coefficients)
    return made.requires_grad_(True).eval()


@torch.no_grad()
def _set(function: Rational, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    numerator, denominator = (torch.tensor(one) for one in coefficients)
    function.numerator.copy_(numerator)
    function.denominator.copy_(denominator.expand_as(function.denominator))


@torch.no_grad()
def _of_function(function: Rational) -> dict[str, float]:
    """How far it is from GELU, and its gain."""
    one = copy.deepcopy(function).cpu().double()
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    y = one(x[:, None].expand(-1, one.groups))[:, 0]
    weights = (-(x**2) / 2).exp()
    inside = x.abs() <= 3
    return {
        "largest_error": float((y - functional.gelu(x))[inside].abs().max()),
        "gain": float(weights.sum() / (weights * y**2).sum()),
    }
