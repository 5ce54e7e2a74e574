"""Claims of the model zoo on phase transitions (Schürholt et al. 2025, arXiv:2504.18072; Yang et al. 2021).

All are about networks of the study's own on digits, at the study's defaults, but that every label is right, as in the
zoo.
"""

from __future__ import annotations

import itertools
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor

from ...probes import Result as Found
from ...studies import run_study, study_named
from ...studies.catalog.model_zoo_phases.model_zoo_phases import phases_of
from ..context import Context
from ..registry import Result, Verdict, claim

NAME, ZOO, TAXONOMY = "model-zoo-phases", "arXiv:2504.18072", "arXiv:2107.11228"
SETTINGS: dict[str, Any] = {"noise": 0.0}


def _found(context: Context) -> Found:
    """The study, run once for all claims."""
    if NAME not in context.shared:
        context.shared[NAME] = run_study(study_named(NAME), SETTINGS, progress=context.progress)
    return context.shared[NAME]


@claim(
    "model-zoo-phases/loss",
    method=NAME,
    paper=ZOO,
    statement="The training loss falls with the width.",
)
def loss(context: Context) -> Result:
    """The mean over temperatures, from each width to the next."""
    return _monotone(_found(context), "training_loss", rises=False)


@claim(
    "model-zoo-phases/similarity",
    method=NAME,
    paper=TAXONOMY,
    statement="The wider the networks, the more alike are the outputs of two seeds.",
)
def similarity(context: Context) -> Result:
    """Linear CKA of held-out logits, the mean over temperatures, from each width to the next."""
    return _monotone(_found(context), "similarity", rises=True)


@claim(
    "model-zoo-phases/sharpness",
    method=NAME,
    paper=TAXONOMY,
    statement="The loss is flatter around models whose training loss is small.",
)
def sharpness(context: Context) -> Result:
    """The median sharpness on each side of the threshold of the loss, and the rank correlation over cells."""
    found = _found(context)
    losses, sharp = found["training_loss"].flatten(), found["sharpness"].flatten()
    there = losses.isfinite()
    losses, sharp, initial = losses[there], sharp[there], found["initial_loss"].flatten()[there]
    small = losses <= found.settings["high"] * initial
    related = float(spearmanr(losses, sharp)[0])  # type: ignore[arg-type]
    rows = _cells(found, ("training_loss", "sharpness", "trace"))
    if not small.any() or small.all():
        return Result(
            Verdict.DOES_NOT_HOLD, f"{int(small.sum())} of {len(small)} cells have a small training loss: there is "
            "nothing to compare", rows,
        )  # fmt: skip
    medians = float(sharp[small].median()), float(sharp[~small].median())
    return Result(
        Verdict.of(medians[0] < medians[1] and related > 0),
        f"median sharpness {medians[0]:.3g} in {int(small.sum())} cells of small training loss, {medians[1]:.3g} in "
        f"the {int((~small).sum())} others; rank correlation of loss and sharpness {related:.2f}",
        rows,
    )


@claim(
    "model-zoo-phases/best-cell",
    method=NAME,
    paper=ZOO,
    statement="The best test accuracy lies in the phase of small loss, connected seeds and alike outputs (IV-B).",
)
def best_cell(context: Context) -> Result:
    """The phases by the study's thresholds, which are ours: the papers read them off the maps."""
    found = _found(context)
    error = found["held_out_error"].nan_to_num(float("inf"))
    row, column = divmod(int(error.argmin()), error.shape[1])
    phases = phases_of(found)
    phase, counts = phases[row][column], sum(row.count("IV-B") for row in phases)
    return Result(
        Verdict.of(phase == "IV-B"),
        f"the best cell, width {found.labels['width'][row]} at batch size {found.labels['temperature'][column]}, with "
        f"accuracy {1 - float(error[row, column]):.4f}, is in phase {phase}; {counts} cells are in IV-B",
        _cells(found, ("held_out_error", "training_loss", "connectivity", "similarity")),
    )


@claim(
    "model-zoo-phases/curve",
    method=NAME,
    paper="arXiv:1802.10026",
    statement="A trained curve joins two seeds at a lower loss than the straight line between them.",
)
def curve(context: Context) -> Result:
    """The highest training loss along each, in every cell, as the mean over its pairs."""
    found = _found(context)
    rows = _cells(found, ())
    highest = [found[name].amax(dim=2).flatten() for name in ("line", "curve")]
    for row, line, bent in zip(rows, *highest, strict=True):
        row |= {"highest on the line": float(line), "highest on the curve": float(bent)}
    lower = int((highest[1] <= highest[0]).sum())
    return Result(
        Verdict.of(lower == len(rows)),
        f"the highest loss is lower along the curve in {lower} of {len(rows)} cells: on average "
        f"{float(highest[0].nanmean()):.3f} nats along the line and {float(highest[1].nanmean()):.3f} along the curve",
        rows,
    )


@claim(
    "model-zoo-phases/matched",
    method=NAME,
    paper=ZOO,
    statement="Weight matching brings seeds closer: mc along the straight line is larger after it.",
)
def matched(context: Context) -> Result:
    """In every cell, as the mean over its pairs."""
    found = _found(context)
    before, after = found["line_connectivity"].flatten(), found["matched_connectivity"].flatten()
    larger = int((after > before).sum())
    return Result(
        Verdict.of(larger == len(before)),
        f"mc is larger in {larger} of {len(before)} cells: on average {float(before.nanmean()):.3f} nats before, "
        f"{float(after.nanmean()):.3f} after",
        _cells(found, ("line_connectivity", "matched_connectivity", "averaged_error", "matched_error")),
    )


def _monotone(found: Found, name: str, rises: bool) -> Result:
    """Whether a figure's mean over temperatures rises, or falls, from each width to the next."""
    values: Tensor = found[name]
    means, widths = values.nanmean(dim=1).tolist(), found.labels["width"]
    sign = 1 if rises else -1
    steps = [sign * (other - one) > 0 for one, other in itertools.pairwise(means)]
    single = (sign * (values[1:] - values[:-1]) > 0).sum(dim=1).tolist()
    return Result(
        Verdict.of(all(steps)),
        f"{', '.join(f'{one:.4g}' for one in means)} at widths {', '.join(widths)}, the mean over temperatures; at "
        f"{', '.join(map(str, single))} of {values.shape[1]} temperatures it {'rises' if rises else 'falls'} from one "
        "width to the next",
        _cells(found, (name,)),
    )


def _cells(found: Found, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each cell of the map."""
    phases = phases_of(found)
    return [
        {
            "width": width, "temperature": hot, "phase": phases[row][column],
            **{name.replace("_", " "): float(found[name][row, column]) for name in names},
        }
        for row, width in enumerate(found.labels["width"])
        for column, hot in enumerate(found.labels["temperature"])
    ]  # fmt: skip
