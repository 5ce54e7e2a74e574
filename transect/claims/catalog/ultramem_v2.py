"""Claims of UltraMemV2 (Huang et al., ICLR 2026, arXiv:2508.18756)."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...parts import build_model, insert
from ...parts.catalog.ultramem_v2 import UltraMem
from ..context import Context, Measured
from ..descent import descend
from ..on_text import measured_on_text, text_length, trained_on_text
from ..pairs import over_seeds
from ..parts_from_scratch import SIZES
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2508.18756"
STEPS, SEEDS, NEURONS = 600, (0, 1, 2), 128
SETTINGS = {"side": 32, "top": 8, "start": "paper"}
CONCENTRATED = {"side": 45, "top": 16, "start": "paper"}  # as many slots, and as many of them read, in one layer
VALUES = 4.0  # the learning rate of values over that of the rest, at the start; it falls to 1 in a line
FACTS, CLASSES, WIDTH, SIDES, FACT_STEPS, FACT_RATE = 2000, 64, 32, (4, 8, 16, 32), 300, 1e-2


@claim(
    "ultramem-v2/below-dense",
    method="ultramem-v2",
    paper=PAPER,
    statement="Trained from scratch with as many operations a position, a model with a memory beside every MLP reaches "
    "a lower loss than one with larger MLPs.",
)
def below_dense(context: Context) -> Result:
    """Scaled down: width 64, two blocks, 1,024 slots a layer of which 8 are read. The memory begins with the variance
    of an MLP and its values learn at up to four times the rate, as in the paper, whose gains come late in long
    trainings; nothing decays, since slots that are not read would."""
    numbers, differences = [], []
    for seed in SEEDS:
        memory, flops = _of_memory(context, seed)
        larger = NEURONS + round(flops / (2 * 3 * SIZES["hidden"]))  # a neuron of a gated MLP has three rows
        dense = measured_on_text(context, _trained(context, seed, larger))
        difference, error = memory.minus(dense)
        differences.append(difference)
        numbers.append({"seed": seed, "memory": memory.loss, "dense": dense.loss, "dense_neurons": larger,
                        "difference": difference, "standard_error": error})  # fmt: skip
    return _judged(differences, numbers)


@claim(
    "ultramem-v2/every-block",
    method="ultramem-v2",
    paper=PAPER,
    statement="Trained from scratch, a memory beside every MLP reaches a lower loss than one memory beside a single "
    "MLP, with as many slots in all and as many of them read.",
)
def every_block(context: Context) -> Result:
    """The model of the claim before, and one whose second block alone has a memory, of 2,025 slots."""
    return _beside(context, ("every_block", "one_block"), CONCENTRATED, layers=[SIZES["blocks"] - 1])


@claim(
    "ultramem-v2/neurons-as-values",
    method="ultramem-v2",
    paper=PAPER,
    statement="Trained from scratch, a memory whose slots are linear neurons reaches a lower loss than one of plain "
    "vectors, with as many numbers read.",
)
def neurons_as_values(context: Context) -> Result:
    """The model of the first claim, and one whose slots are vectors as long as a neuron's two."""
    return _beside(context, ("neurons", "vectors"), {**SETTINGS, "values": "vectors"})


@claim(
    "ultramem-v2/more-slots",
    method="ultramem-v2",
    paper=PAPER,
    statement="The more slots a memory has, the more random facts it learns, with as many of them read for each.",
)
def more_slots(context: Context) -> Result:
    """2,000 random vectors, each with one of 64 random classes, read by a memory alone and a matrix behind it. It is
    trained on facts, and says nothing of the model."""
    numbers = [
        {"seed": seed, "slots": side * side, "recalled": _recalled(side, seed)} for seed in SEEDS for side in SIDES
    ]
    by_size = [fmean(row["recalled"] for row in numbers if row["slots"] == side * side) for side in SIDES]
    held = [
        more["recalled"] > less["recalled"]
        for less, more in pairwise(numbers)
        if less["seed"] == more["seed"]
    ]  # fmt: skip
    told = ", ".join(f"{side * side} slots {share:.3f}" for side, share in zip(SIDES, by_size, strict=True))
    return Result(
        Verdict.of(all(held)),
        f"More with more slots in {sum(held)} of {len(held)} comparisons; recalled on average: {told}; by chance "
        f"{1 / CLASSES:.3f}",
        numbers,
    )


def _beside(
    context: Context, names: tuple[str, str], settings: dict[str, Any], layers: list[int] | None = None
) -> Result:
    """A memory beside every MLP, which is to have the lower loss, and one of these settings. names: of both."""
    numbers, differences = [], []
    for seed in SEEDS:
        everywhere, _ = _of_memory(context, seed)
        other = measured_on_text(context, _trained(context, seed, NEURONS, settings, layers))
        difference, error = everywhere.minus(other)
        differences.append(difference)
        numbers.append({"seed": seed, names[0]: everywhere.loss, names[1]: other.loss,
                        "difference": difference, "standard_error": error})  # fmt: skip
    return _judged(differences, numbers)


def _judged(differences: list[float], numbers: list[dict[str, Any]]) -> Result:
    found, count = over_seeds(differences), len(differences)
    return Result(
        Verdict.of(found.lower),
        f"The difference of the losses is {found} (standard error over {count} seeds), lower from "
        f"{sum(one < 0 for one in differences)} of them, after {STEPS} steps",
        numbers,
    )


def _of_memory(context: Context, seed: int) -> tuple[Measured, int]:
    """The loss with a memory beside every MLP, and the operations of the largest; three claims need it."""
    kept = context.shared.setdefault("ultramem-v2", {})
    if seed not in kept:
        model = _trained(context, seed, NEURONS, SETTINGS)
        flops = max(part.flops for part in model.modules() if isinstance(part, UltraMem))
        kept[seed] = measured_on_text(context, model), flops
    return kept[seed]


def _trained(
    context: Context, seed: int, neurons: int, settings: dict[str, Any] | None = None, layers: list[int] | None = None
) -> Any:
    """A small Llama, with a memory where there are settings for it; its values have their rates, the rest is alike."""
    model = build_model(
        "llama", seed=seed, neurons=neurons, vocabulary=context.anatomy.config.vocab_size,
        length=text_length(context), **SIZES,
    )  # fmt: skip
    if settings is not None:
        insert(model, "block", "ultramem-v2", layers=layers, settings=settings, seed=seed)
    values = [name for name, _ in model.named_parameters() if ".bank." in name]
    return trained_on_text(
        context, model, STEPS, seed, factors=lambda done: dict.fromkeys(values, VALUES - (VALUES - 1) * done)
    )


def _recalled(side: int, seed: int) -> float:
    """Share of the facts whose class a memory of side² slots gives, after training on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        facts, classes = torch.randn(FACTS, WIDTH), torch.randint(CLASSES, (FACTS,))
        memory = UltraMem(WIDTH, 4 * WIDTH, 0, 1, 0, side=side, top=4, start="paper")
        head = nn.Linear(WIDTH, CLASSES)

        def loss(_: int) -> Tensor:
            return functional.cross_entropy(head(memory.memory(facts)), classes)

        descend(nn.ModuleList([memory, head]), loss, FACT_STEPS, FACT_RATE, weight_decay=0.0)
        with torch.no_grad():
            return float((head(memory.memory(facts)).argmax(-1) == classes).double().mean())
