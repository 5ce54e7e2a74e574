"""The table and the plots of a contest of parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..store import replacing
from .number import in_bytes
from .pareto import COLOURS, MARKERS
from .table import grid, markdown

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none
_MOST_COLUMNS = 8  # of scores by what answers depend on, as a table


def parts_notes(frame: pd.DataFrame) -> list[str]:
    """What the columns are, and why rows have no numbers."""
    first = frame["entrant"].iloc[0]
    lines = [
        f"task {frame.attrs['task']}; each at its best rate of {', '.join(f'{r:g}' for r in frame.attrs['rates'])}, by "
        "validation examples of its own; ±: standard error over seeds",
        f"against {first}: the mean difference over seeds, p of a paired t-test, and the difference that so many seeds "
        "would show in 80 % of contests",
    ]
    if "crossover" in frame.columns:
        lengths = sorted({row["length"] for row in frame.attrs["speeds"]})
        lines.append(
            f"faster from: the length, of {lengths[0]:,} to {lengths[-1]:,}, from which on it reads faster than "
            "with the model's own attention (torch's scaled_dot_product_attention)"
        )
    if "edge" in frame.columns and (edge := frame[frame["edge"] == True]["entrant"].tolist()):  # noqa: E712
        lines.append(f"at the edge of the grid of rates, so that another rate may be better still: {', '.join(edge)}")
    if told := _baselines(frame):
        lines.append(f"no models, but rules, on the examples that judge (±: over these): {', '.join(told)}")
    if "note" in frame.columns:
        lines += [f"{row['entrant']}: {row['note']}" for _, row in frame[frame["note"].notna()].iterrows()]
    return lines


def _baselines(frame: pd.DataFrame) -> list[str]:
    """The names of the rows that are no models."""
    return frame[frame["baseline"] == True]["entrant"].tolist() if "baseline" in frame.columns else []  # noqa: E712


def parts_cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and text cells; a dash for what a row has not."""
    further = [column for column in frame.attrs["scores"] if column in frame.columns]
    headings = ["entrant", "parameters", "FLOPs", "rate", "loss", "accuracy", *further, "against the first", "p"]
    headings += [
        "detectable",
        "s/step",
        "s/forward",
        *(["faster from"] if "crossover" in frame.columns else []),
        "seeds",
    ]
    rows = []
    for _, row in frame.iterrows():
        cells = [row["entrant"], _written(row, "parameters", ",.0f"), _written(row, "flops", ".3g")]
        cells += [_written(row, "rate", "g"), _pair(row, "loss", ".4f"), _pair(row, "accuracy", ".4f")]
        cells += [_written(row, column, ".1%") for column in further]
        cells += [_written(row, "difference", "+.4f"), _written(row, "p", ".3f"), _written(row, "detectable", ".4f")]
        cells += [_written(row, "seconds_a_step", ".3f"), _written(row, "forward_seconds", ".4f")]
        if "crossover" in frame.columns:
            cells.append("never" if row.to_dict()["crossover"] == math.inf else _written(row, "crossover", ",.0f"))
        rows.append([*cells, _written(row, "seeds", ".0f")])
    return headings, rows


def _speed_cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, cells and notes of the speeds by length, an entrant a row; none where nothing was measured."""
    measured = frame.attrs["speeds"]
    lengths = sorted({row["length"] for row in measured})
    headings = ["entrant"]
    for what in ("ms to read", "ms a token", "memory", "state"):
        headings += [f"{what}, {length:,}" for length in lengths]
    found = {(row["entrant"], row["length"]): row for row in measured}
    rows = []
    for entrant in dict.fromkeys(row["entrant"] for row in measured):
        cells = [entrant]
        for column, write in (
            ("prefill", _milliseconds),
            ("decode", _milliseconds),
            ("memory", in_bytes),
            ("state", in_bytes),
        ):
            values = [found.get((entrant, length), {}).get(column) for length in lengths]
            cells += ["-" if value is None else write(value) for value in values]
        rows.append(cells)
    notes = [
        "one sequence of so many positions: time to read it, and for one more token behind it; the tensors that are "
        "there at once in reading, weights apart; what is kept for the next token"
    ]
    notes += [f"{row['entrant']}: {row['note']}" for row in measured if "note" in row]
    return headings, rows, notes


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _by_cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, cells and notes of the scores by what the answers depend on; none where that is nothing, or much."""
    by = frame.attrs["by"]
    values = list(next(iter(by.values()))) if by else []
    if not 0 < len(values) <= _MOST_COLUMNS:
        return [], [], []
    headings = ["entrant", *(f"{value} {frame.attrs['over']}" for value in values)]
    what = "accuracy" if "accuracy" in frame.columns else "squared error"
    rows = [[name, *(f"{scores[value]:.4f}" for value in values)] for name, scores in by.items()]
    return headings, rows, [f"{what} by {frame.attrs['over']}, the mean over seeds"]


def by_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The scores by what the answers depend on: an entrant a row, a column for each value."""
    import pandas as pd

    return pd.DataFrame(frame.attrs["by"]).T.rename_axis("entrant")


def speeds_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The speeds: a row for each entrant and length."""
    import pandas as pd

    return pd.DataFrame(frame.attrs["speeds"])


def further_tables(frame: pd.DataFrame) -> list[Table]:
    """For the terminal: scores by what the answers depend on, and speeds by length, where there are any."""
    tables = (_by_cells(frame), _speed_cells(frame))
    return [grid(headings, rows, "", notes, [False] * len(rows)) for headings, rows, notes in tables if rows]


def _pair(row: Any, column: str, form: str) -> str:
    error = _written(row, f"{column}_error", form)
    return _written(row, column, form) + ("" if error == "-" else f" ± {error}")


def _written(row: Any, column: str, form: str) -> str:
    import pandas as pd

    value: Any = row.get(column)
    return "-" if value is None or bool(pd.isna(value)) else format(value, form)


def parts_table(frame: pd.DataFrame, title: str = "") -> Table:
    """For the terminal; the least loss of a model is bold."""
    losses = [row.get("loss", math.nan) for row in frame.to_dict("records")]
    models = [
        loss == loss and name not in _baselines(frame) for loss, name in zip(losses, frame["entrant"], strict=True)
    ]
    least = min((loss for loss, model in zip(losses, models, strict=True) if model), default=None)
    bold = [model and loss == least for loss, model in zip(losses, models, strict=True)]
    return grid(*parts_cells(frame), title, parts_notes(frame), bold)


def parts_markdown(frame: pd.DataFrame) -> str:
    """For a README."""
    tables = [(*parts_cells(frame), parts_notes(frame)), _by_cells(frame), _speed_cells(frame)]
    return "\n".join(markdown(headings, rows, notes) for headings, rows, notes in tables if rows)


def parts_plot(frame: pd.DataFrame, path: Path, title: str = "") -> Path:
    """What was learned, how, and what it costs, as PNG (150 dots an inch).

    Held-out loss and accuracy over steps (means over seeds; thin: training loss), the loss or accuracy of each entrant
    with its error, both by what the task's answers depend on, and time and memory by length; each where there is any.
    Baselines are dashed.
    """
    from matplotlib.figure import Figure  # takes a second to import

    attrs = frame.attrs
    names = [*frame["entrant"], *(row["entrant"] for row in attrs["speeds"])]
    styles = {name: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]} for i, name in enumerate(dict.fromkeys(names))}
    for name in _baselines(frame):
        styles[name] |= {"linestyle": "--", "marker": ""}
    right = "accuracy" in frame.columns and bool(frame["accuracy"].notna().any())
    panels = [lambda axes: _course(axes, attrs["curves"], styles, 2, "held-out loss")]
    if right:
        panels.append(lambda axes: _course(axes, attrs["curves"], styles, 3, "held-out accuracy"))
    panels.append(lambda axes: _ends(axes, frame, styles, "accuracy" if right else "loss"))
    if attrs["by"]:
        panels.append(
            lambda axes: _by(axes, attrs["by"], styles, attrs["over"], "accuracy" if right else "squared error")
        )
    if any("prefill" in row for row in attrs["speeds"]):
        for column, told in _BY_LENGTH.items():
            panels.append(
                lambda axes, column=column, told=told: _by_length(axes, attrs["speeds"], styles, column, told)
            )
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5 * across, 3.8 * down), layout="constrained")
    every = figure.subplots(down, across, squeeze=False).flatten()
    for axes, draw in zip(every, panels, strict=False):
        draw(axes)
        axes.grid(alpha=0.25)
    for axes in every[len(panels) :]:
        axes.axis("off")
    handles = {label: line for axes in every for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path


_BY_LENGTH = {
    "prefill": "seconds to read", "decode": "seconds for a token behind", "memory": "bytes at once, reading",
    "state": "bytes kept for the next token",
}  # fmt: skip


def _course(axes: Any, curves: Mapping[str, Any], styles: Mapping[str, Any], column: int, told: str) -> None:
    for entrant, points in curves.items():
        steps = [point[0] for point in points]
        if column == 2:
            axes.plot(steps, [point[1] for point in points], color=styles[entrant]["color"], lw=0.7, alpha=0.6)
        axes.plot(steps, [point[column] for point in points], label=entrant, ms=3, **styles[entrant])
    axes.set_xlabel("steps")
    axes.set_ylabel(told)


def _ends(axes: Any, frame: pd.DataFrame, styles: Mapping[str, Any], column: str) -> None:
    """A point for each row with its standard error; the first row is at the top."""
    done = frame.dropna(subset=[column]) if column in frame.columns else frame.iloc[:0]
    for row in done.to_dict("records"):
        error = row[f"{column}_error"]
        style = {"color": styles[row["entrant"]]["color"], "marker": styles[row["entrant"]]["marker"] or "|"}
        axes.errorbar(
            row[column],
            row["entrant"],
            xerr=0.0 if error is None or error != error else error,
            ls="",
            capsize=2,
            **style,
        )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(f"{column} on held-out examples")


def _by(axes: Any, by: Mapping[str, Mapping[str, float]], styles: Mapping[str, Any], over: str, told: str) -> None:
    for name, values in by.items():
        axes.plot([float(value) for value in values], list(values.values()), label=name, ms=3, **styles[name])
    if told == "squared error":
        axes.set_yscale("log")
    axes.set_xlabel(over)
    axes.set_ylabel(told)


def _by_length(
    axes: Any, speeds: Sequence[Mapping[str, Any]], styles: Mapping[str, Any], column: str, told: str
) -> None:
    for name in dict.fromkeys(row["entrant"] for row in speeds):
        points = [(row["length"], row[column]) for row in speeds if row["entrant"] == name and row.get(column)]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, ms=3, **styles[name])
    lengths = sorted({row["length"] for row in speeds})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("positions")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axes.minorticks_off()
    axes.set_ylabel(told)
