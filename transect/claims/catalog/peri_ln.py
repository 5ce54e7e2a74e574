"""Claims of Peri-LN (Kim et al., ICML 2025, arXiv:2502.02732)."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from ...anatomy import Anatomy
from ...data import Batches, Specimen
from ...errors import Diverged
from ...forward import task_of
from ...parts import build_model
from ...probes import run_probes
from ...probes.catalog.stream_growth import fit
from ...training import own_loss
from ..context import Context
from ..descent import descend
from ..on_text import measured_on_text
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import cut

PLACEMENTS = ("pre-ln", "peri-ln", "post-ln")
WIDTH, BLOCKS, NEURONS, HEADS = 48, 8, 128, 4
LENGTH, STEPS, BATCH, RATES, SEEDS = 64, 80, 8, (3e-3, 3e-2), (0, 1)


@claim(
    "peri-ln/high-rates",
    method="peri-ln",
    paper="arXiv:2502.02732",
    statement="Trained at high rates, Peri-LN diverges no more often than Pre-LN, its largest activation is smaller, "
    "and at the better rate of each its loss is no higher.",
)
def high_rates(context: Context) -> Result:
    """Scaled down: a Llama of 8 blocks and width 48, from new weights, on the calibration data at two rates.

    The same data, order and schedule for all placements. A training has diverged if its loss is not finite, or no
    lower than that of guessing. Post-LN stands beside them and is not judged.
    """
    if task_of(context.model) != "causal":
        raise NotApplicable(
            f"it trains models that predict the next token, and {type(context.model).__name__} does not"
        )
    texts = list(context.calibration.texts())
    rows = cut(texts, min(LENGTH, max(map(len, texts))), STEPS * BATCH)
    numbers = [
        _trained(context, rows, placement, rate, seed) for placement in PLACEMENTS for rate in RATES for seed in SEEDS
    ]
    for row in numbers:
        row["diverged"] = not row["loss"] < math.log(context.anatomy.config.vocab_size)
    of = {name: [row for row in numbers if row["norms"] == name] for name in PLACEMENTS}
    failed = {name: sum(row["diverged"] for row in found) for name, found in of.items()}
    largest = {name: mean(row["largest"] for row in found) for name, found in of.items()}
    loss = {
        name: min(mean(row["loss"] for row in found if row["rate"] == rate) for rate in RATES)
        for name, found in of.items()
    }
    complaints = [
        said
        for said, bad in (
            ("it diverged more often", failed["peri-ln"] > failed["pre-ln"]),
            ("its largest activation is no smaller", not largest["peri-ln"] < largest["pre-ln"]),
            ("its loss is higher", not loss["peri-ln"] <= loss["pre-ln"] + _noise(of["pre-ln"])),
        )
        if bad
    ]
    told = "; ".join(
        f"{name} diverged in {failed[name]} of {len(of[name])}, largest activation {largest[name]:.3g}, loss "
        f"{loss[name]:.3f}"
        for name in PLACEMENTS
    )
    return Result(
        Verdict.DOES_NOT_HOLD if complaints else Verdict.HOLDS,
        told + (f". Of Peri-LN: {', '.join(complaints)}" if complaints else ""),
        numbers,
    )


def _noise(rows: list[dict[str, Any]]) -> float:
    """How far seeds are apart at the better rate."""
    spreads = []
    for rate in RATES:
        found = [row["loss"] for row in rows if row["rate"] == rate]
        spreads.append((mean(found), max(found) - min(found)))
    return min(spreads)[1]


def _trained(context: Context, rows: list[Any], placement: str, rate: float, seed: int) -> dict[str, Any]:
    """A training: its held-out loss, and how the stream has grown behind it."""
    model = build_model(
        "llama", parts={"norm": placement}, hidden=WIDTH, blocks=BLOCKS, heads=HEADS, neurons=NEURONS,
        vocabulary=context.anatomy.config.vocab_size, length=max(map(len, context.evaluation.texts())), seed=seed,
    ).to(context.model.device)  # fmt: skip
    order = torch.Generator().manual_seed(seed)

    def loss(_: int) -> torch.Tensor:
        chosen = torch.randint(len(rows), (BATCH,), generator=order).tolist()
        batch = {"input_ids": torch.stack([rows[index] for index in chosen])}
        summed, count = own_loss(model, batch)
        return summed / count

    found = {"norms": placement, "rate": rate, "seed": seed}
    try:
        descend(model, loss, STEPS, rate, weight_decay=0.0)
    except Diverged:
        return {**found, "loss": math.inf, "largest": math.inf}
    specimen: Specimen = replace(context.specimen, anatomy=Anatomy(model), data=Batches(list(context.evaluation)[:2]))
    grown = run_probes(specimen, {"stream-growth": {}})["stream-growth"]
    variance, gradient = grown["variance"], grown["gradient"]
    straight, exponential = fit(variance)
    return {
        **found, "loss": measured_on_text(context, model).loss, "largest": float(grown["largest"].max()),
        "variance_first": float(variance[0]), "variance_last": float(variance[-1]), "straight_line": straight,
        "line_of_logarithms": exponential, "gradient_longest_over_shortest": float(gradient.max() / gradient.min()),
    }  # fmt: skip
