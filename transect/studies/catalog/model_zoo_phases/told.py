"""What the map says, in sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor

from .phases import MEANING, Placed
from .zoo import PhaseMap

WORDS = {"batch-size": "batch size", "learning-rate": "learning rate"}


def told(
    made: PhaseMap, placed: Sequence[Sequence[Placed]], temperature: str, noise: float
) -> tuple[list[str], list[str]]:
    """Findings and caveats of a map. noise: share of the training labels that are wrong."""
    figures, word = made.figures, WORDS[temperature]
    where: dict[str, list[str]] = {}
    for width, row in zip(made.loads, placed, strict=True):
        for hot, one in zip(made.temperatures, row, strict=True):
            where.setdefault(one.phase, []).append(f"{width} x {hot:g}")
    findings = [
        f"Phase {phase} ({MEANING[phase]}): {len(cells)} of {sum(map(len, where.values()))} cells, width x {word} "
        f"{_some(cells)}."
        for phase, cells in sorted(where.items())
    ]
    if "held_out_error" not in figures:
        return findings, ["Every training diverged: lower the rate."]
    best = figures["held_out_error"].nan_to_num(math.inf).argmin().item()
    row, column = divmod(int(best), len(made.temperatures))
    error = figures["held_out_error"]
    findings.append(
        f"The least held-out error is {float(error[row, column]):.2%}, at width {made.loads[row]} and {word} "
        f"{made.temperatures[column]:g}: {placed[row][column]}."
    )
    loss, sharp = figures["training_loss"].flatten(), figures["sharpness"].flatten()
    findings.append(
        "Averaged over temperatures, from the narrowest to the widest: training loss "
        f"{_by_width(figures['training_loss'])}, sharpness {_by_width(figures['sharpness'])}, similarity "
        f"{_by_width(figures['similarity'])}. The rank correlation of training loss and sharpness over cells is "
        f"{_correlation(loss, sharp)}."
    )
    findings.append(_of_averages(made, placed))
    return findings, [*_CAVEATS, *([_NOISY] if noise else [])]


_CAVEATS = [
    "The papers read phases off maps by eye; the thresholds are Transect's own, shares of the initial loss, and the "
    "map's median for similarity, so that half of the map is above it whatever it holds. Look at the numbers.",
    "At a loss near 0 the Hessian of a cross-entropy vanishes: small sharpness there says little of a flat minimum.",
    "CKA of logits over few classes is soon near 1, and too high for few examples; the unbiased one stands beside it.",
    "The stop rules of eigenvalue and trace may end early. Two seeds are one pair: give more for what is to last.",
]


_NOISY = (
    "Where training labels are wrong, a network that tells the right ones has a training loss that may count as high: "
    "phase II can then be the one that generalises, and a small loss the one that is over-fitted."
)


def _of_averages(made: PhaseMap, placed: Sequence[Sequence[Placed]]) -> str:
    """What averaging two seeds costs, by phase."""
    figures = made.figures
    names = [name for name in ("averaged_error", "matched_error") if name in figures]
    costs: dict[str, list[list[float]]] = {}
    for row, line in enumerate(placed):
        for column, one in enumerate(line):
            if one.phase != "diverged":
                own = float(figures["held_out_error"][row, column])
                costs.setdefault(one.phase, []).append([float(figures[name][row, column]) - own for name in names])
    counts = Counter({phase: len(rows) for phase, rows in costs.items()})
    parts = []
    for phase, rows in sorted(costs.items()):
        means = torch.tensor(rows).mean(dim=0).tolist()
        after = f" ({100 * means[1]:+.1f} after weight matching)" if len(means) > 1 else ""
        parts.append(f"{100 * means[0]:+.1f} points{after} in phase {phase} ({counts[phase]} cells)")
    return f"The average of two seeds' numbers changes the held-out error by {', '.join(parts)}."


def _by_width(values: Tensor) -> str:
    return ", ".join(f"{one:.3g}" for one in values.nanmean(dim=1).tolist())


def _correlation(one: Tensor, other: Tensor) -> str:
    there = ~(one.isnan() | other.isnan())
    if int(there.sum()) < 3:
        return "not to be told"
    return f"{float(spearmanr(one[there], other[there])[0]):.2f}"  # type: ignore[arg-type]


def _some(cells: Sequence[str], most: int = 6) -> str:
    return ", ".join(cells[:most]) + (f" and {len(cells) - most} more" if len(cells) > most else "")
