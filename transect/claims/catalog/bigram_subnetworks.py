"""Claims of bigram subnetworks (Chang and Bergen, NeurIPS 2025, arXiv:2504.15471)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import NotApplicable
from ...probes import Result as Found
from ...probes.catalog.bigram_subnetworks.bigram_subnetworks import (
    FOUND,
    FULL,
    KINDS,
    LARGEST,
    RANDOM,
    WITHOUT,
    WITHOUT_RANDOM,
    jump,
)  # fmt: skip
from ...probes.catalog.bigram_subnetworks.masks import unpacked
from ..context import Context
from ..probing import probed, probed_once, untrained
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2504.15471"
METHOD = "bigram-subnetworks"
STEPS = 200  # of the masks; the rest as by default
MOST, AGREES = 0.15, 0.9  # share of the weights that the smallest model of the paper needs, and r


@claim(
    "bigram-subnetworks/sufficient",
    method=METHOD,
    paper=PAPER,
    statement="At most 15 % of the blocks' weights predict as a bigram table does (r of surprisals at least 0.9), "
    "better than the whole model and than as many of the largest or of random weights.",
)
def sufficient(context: Context) -> Result:
    """On the last quarter of the calibration text; table and masks are of the rest.

    The same search in a model with random weights is shown too, and not judged: by the paper it finds a subnetwork as
    well.
    """
    found = _found(context)
    fresh = probed(untrained(context.specimen), METHOD, steps=STEPS)
    share, r = _by_kind(found, "kept"), _by_kind(found, "correlation")
    rows = [{"model": "trained", **row} for row in _rows(found)]
    rows += [{"model": "random weights", **row} for row in _rows(fresh)]
    holds = share[FOUND] <= MOST and r[FOUND] >= AGREES and all(r[FOUND] > r[kind] for kind in (FULL, LARGEST, RANDOM))
    other = rows[len(KINDS) + KINDS.index(FOUND)]
    return Result(
        Verdict.of(holds),
        f"{share[FOUND]:.1%} of the weights have r = {r[FOUND]:.3f}; the whole model {r[FULL]:.3f}, as many of the "
        f"largest {r[LARGEST]:.3f}, as many random ones {r[RANDOM]:.3f}. In a model with random weights "
        f"{other['share']:.1%} have r = {other['r']:.3f}. {float(found['seen']):.0%} of the pairs were in the table.",
        rows,
    )


@claim(
    "bigram-subnetworks/necessary",
    method=METHOD,
    paper=PAPER,
    statement="Without the bigram subnetwork the model loses more than without as many random weights of each matrix.",
)
def necessary(context: Context) -> Result:
    """By the loss on the last quarter of the calibration text."""
    found = _found(context)
    loss = _by_kind(found, "loss")
    own, random = loss[WITHOUT] - loss[FULL], loss[WITHOUT_RANDOM] - loss[FULL]
    return Result(
        Verdict.of(own > random),
        f"Without the {_by_kind(found, 'kept')[FOUND]:.1%} of the subnetwork the loss rises by {own:.3f} nats, without "
        f"as many random weights by {random:.3f}, from {loss[FULL]:.3f}.",
        _rows(found),
    )


@claim(
    "bigram-subnetworks/first-mlp",
    method=METHOD,
    paper=PAPER,
    statement="Of all attentions and MLPs the first MLP has the highest share of kept weights.",
)
def first_mlp(context: Context) -> Result:
    """Weights of all matrices of a sublayer together."""
    found = _found(context)
    matrices = context.specimen.matrices()
    masks = unpacked(found["masks"], matrices)
    sums: dict[tuple[int, str], list[int]] = {}
    for one in matrices:
        total = sums.setdefault((one.block.index, one.unit.partition(".")[0]), [0, 0])
        total[0] += int(masks[one.name].sum())
        total[1] += masks[one.name].numel()
    rows = [
        {"layer": layer, "sublayer": unit, "kept": kept / of, "weights": kept}
        for (layer, unit), (kept, of) in sums.items()
    ]  # fmt: skip
    mlps = [layer for layer, unit in sums if unit != "attention"]
    if not mlps:
        raise NotApplicable("the model has no MLP")
    best = max(rows, key=lambda row: row["kept"])
    first = next(row for row in rows if row["layer"] == min(mlps) and row["sublayer"] != "attention")
    return Result(
        Verdict.of(best is first),
        f"The densest is the {best['sublayer']} of layer {best['layer']} with {best['kept']:.1%}; the first MLP has "
        f"{first['kept']:.1%}, and {first['weights'] / max(1, int(found['weights'])):.0%} of all kept weights.",
        rows,
    )


@claim(
    "bigram-subnetworks/first-block",
    method=METHOD,
    paper=PAPER,
    statement="What a linear map from a layer to the last one predicts agrees with the model's output by a jump in the "
    "first block, in the whole model and in the subnetwork alike.",
)
def first_block(context: Context) -> Result:
    """A jump: no other block gains as much in r. The maps are fitted on three quarters of the calibration text."""
    found = _found(context)
    curves = dict(zip(found.labels["model"], found["output lens"], strict=True))
    rows = [
        {"model": name, "state": state, "r": float(r)}
        for name, curve in curves.items() for state, r in enumerate(curve)
    ]  # fmt: skip
    steps = {name: curve.diff() for name, curve in curves.items()}
    told = "; ".join(
        f"{name}: {jump(curve):.0%} of the gain is of the first block, most of block {int(steps[name].argmax())}"
        for name, curve in curves.items()
    )
    holds = all(int(step.argmax()) == 0 and float(step[0]) > 0 for step in steps.values())
    return Result(Verdict.of(holds), f"{told}.", rows)


def _found(context: Context) -> Found:
    found = probed_once(context, METHOD, steps=STEPS)
    if not int(found["weights"]):
        raise NotApplicable("the masks ended with no weight kept: there is no subnetwork to judge")
    return found


def _by_kind(found: Found, what: str) -> Mapping[str, float]:
    return dict(zip(KINDS, found[what].tolist(), strict=True))


def _rows(found: Found) -> list[dict[str, Any]]:
    """A row for each choice of weights."""
    names = {"kept": "share", "correlation": "r", "loss": "loss", "distance": "distance"}
    columns = {said: _by_kind(found, what) for what, said in names.items()}
    return [{"weights": kind, **{said: column[kind] for said, column in columns.items()}} for kind in KINDS]
