"""The table and the plot of a contest of trainings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..store import replacing
from .pareto import COLOURS, MARKERS
from .table import grid, markdown

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none

_TEXTS = {"eval": "target", "forgets": "other text"}


def contest_notes(frame: pd.DataFrame) -> list[str]:
    """What the columns are, and why rows have no numbers."""
    lines = [
        "each at its best rate of "
        + ", ".join(f"{factor:g}" for factor in frame.attrs["rates"])
        + " times its own, by the loss on a part of the training text",
        "±: standard error of the change over the text's sequences; over seeds: that of the mean over seeds",
    ]
    if "note" in frame.columns:
        lines += [f"{row['method']}: {row['note']}" for _, row in frame[frame["note"].notna()].iterrows()]
    return lines


def contest_cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and text cells; a dash for what a row has not."""
    texts = [name for name in _TEXTS if name in frame.columns]
    headings = ["method", "trained", "rate"]
    for name in texts:
        headings += [_TEXTS[name], f"{_TEXTS[name]}, change", "over seeds"]
    headings += ["optimizer bytes", "s/step", "seeds"]
    rows = []
    for _, row in frame.iterrows():
        cells = [row["method"], _written(row, "trained", ",.0f"), _written(row, "rate", ".2g")]
        for name in texts:
            change = _written(row, f"{name}_change", "+.4f")
            if (error := _written(row, f"{name}_error", ".4f")) != "-":
                change += f" ± {error}"
            cells += [_written(row, name, ".4f"), change, _written(row, f"{name}_seed_error", ".4f")]
        cells += [_written(row, "optimizer_bytes", ",.0f"), _written(row, "seconds_a_step", ".3f")]
        rows.append([*cells, _written(row, "seeds", ".0f")])
    return headings, rows


def _written(row: Any, column: str, form: str) -> str:
    import pandas as pd

    value: Any = row.get(column)
    return "-" if value is None or bool(pd.isna(value)) else format(value, form)


def contest_table(frame: pd.DataFrame, title: str = "") -> Table:
    """For the terminal; the least target loss is bold."""
    best = frame["eval"].iloc[1:].idxmin() if frame["eval"].iloc[1:].notna().any() else None
    return grid(*contest_cells(frame), title, contest_notes(frame), [index == best for index in frame.index])


def contest_markdown(frame: pd.DataFrame) -> str:
    """For a README."""
    return markdown(*contest_cells(frame), contest_notes(frame))


def contest_plot(frame: pd.DataFrame, path: Path, title: str = "") -> Path:
    """Loss on each text over the trained numbers, a line for each method, as PNG (150 dots an inch).

    The dashed line is the model before training.
    """
    from matplotlib.figure import Figure  # takes a second to import

    texts = [name for name in _TEXTS if name in frame.columns]
    figure = Figure(figsize=(6 * len(texts), 4.5), layout="constrained")
    for number, (name, axes) in enumerate(zip(texts, figure.subplots(1, len(texts), squeeze=False)[0], strict=True)):
        axes.axhline(frame[name].iloc[0], color="0.6", linestyle="--", linewidth=1)
        rest = frame.iloc[1:].dropna(subset=name)
        for index, (method, line) in enumerate(rest.groupby("method", sort=False)):
            line = line.sort_values("trained")
            axes.errorbar(
                line["trained"], line[name], yerr=line[f"{name}_seed_error"].fillna(0.0), label=str(method),
                color=COLOURS[index % 7], marker=MARKERS[(index + index // 7) % 7], markersize=5, capsize=2,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("trained numbers")
        axes.set_ylabel(f"loss on the {_TEXTS[name]} (nats a prediction)")
        axes.grid(alpha=0.25)
        if number == 0 and len(rest):
            axes.legend(frameon=False, fontsize=8)
            axes.set_title(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path
