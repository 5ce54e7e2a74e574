"""The table and the plots of a contest of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..store import replacing
from .pareto import COLOURS, MARKERS
from .table import grid, markdown

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none


def parts_notes(frame: pd.DataFrame) -> list[str]:
    """What the columns are, and why rows have no numbers."""
    first = frame["entrant"].iloc[0]
    lines = [
        f"task {frame.attrs['task']}; each at its best rate of {', '.join(f'{r:g}' for r in frame.attrs['rates'])}, by "
        "validation examples of its own; ±: standard error over seeds",
        f"against {first}: the mean difference over seeds, p of a paired t-test, and the difference that so many seeds "
        "would show in 80 % of contests",
    ]
    if "edge" in frame.columns and (edge := frame[frame["edge"] == True]["entrant"].tolist()):  # noqa: E712
        lines.append(f"at the edge of the grid of rates, so that another rate may be better still: {', '.join(edge)}")
    if "note" in frame.columns:
        lines += [f"{row['entrant']}: {row['note']}" for _, row in frame[frame["note"].notna()].iterrows()]
    return lines


def parts_cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and text cells; a dash for what a row has not."""
    headings = ["entrant", "parameters", "FLOPs", "rate", "loss", "accuracy", "against the first", "p", "detectable"]
    headings += ["s/step", "s/forward", "seeds"]
    rows = []
    for _, row in frame.iterrows():
        cells = [row["entrant"], _written(row, "parameters", ",.0f"), _written(row, "flops", ".3g")]
        cells += [_written(row, "rate", "g"), _pair(row, "loss", ".4f"), _pair(row, "accuracy", ".4f")]
        cells += [_written(row, "difference", "+.4f"), _written(row, "p", ".3f"), _written(row, "detectable", ".4f")]
        cells += [_written(row, "seconds_a_step", ".3f"), _written(row, "forward_seconds", ".4f")]
        rows.append([*cells, _written(row, "seeds", ".0f")])
    return headings, rows


def _pair(row: Any, column: str, form: str) -> str:
    error = _written(row, f"{column}_error", form)
    return _written(row, column, form) + ("" if error == "-" else f" ± {error}")


def _written(row: Any, column: str, form: str) -> str:
    import pandas as pd

    value: Any = row.get(column)
    return "-" if value is None or bool(pd.isna(value)) else format(value, form)


def parts_table(frame: pd.DataFrame, title: str = "") -> Table:
    """For the terminal; the least loss is bold."""
    losses = {
        row: loss for row, loss in enumerate(frame["loss"] if "loss" in frame.columns else []) if loss == loss
    }  # NaN is not
    best = min(losses, key=lambda row: losses[row]) if losses else None
    return grid(*parts_cells(frame), title, parts_notes(frame), [index == best for index in frame.index])


def parts_markdown(frame: pd.DataFrame) -> str:
    """For a README."""
    return markdown(*parts_cells(frame), parts_notes(frame))


def parts_plot(
    frame: pd.DataFrame, curves: Mapping[str, Sequence[Sequence[float]]], path: Path, title: str = ""
) -> Path:
    """Training loss over steps, and the loss of each entrant with its error, as PNG (150 dots an inch).

    curves: entrant -> [step, loss] of its first seed at its best rate.
    """
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    steps, losses = figure.subplots(1, 2)
    for index, (entrant, curve) in enumerate(curves.items()):
        steps.plot(*zip(*curve, strict=True), label=entrant, color=COLOURS[index % 7], marker=MARKERS[index % 7], ms=4)
    steps.set_xlabel("steps")
    steps.set_ylabel("training loss (nats an answer)")
    if curves:
        steps.legend(frameon=False, fontsize=8)
    done = frame.dropna(subset=["loss"]) if "loss" in frame.columns else frame.iloc[:0]
    if len(done):
        losses.errorbar(done["loss"], done["entrant"], xerr=done["loss_error"].fillna(0.0), fmt="o", capsize=2)
        losses.invert_yaxis()
    losses.set_xlabel("loss on held-out examples")
    for axes in (steps, losses):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path
