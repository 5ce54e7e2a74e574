"""The Pareto plot: what each method loses at each size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store import replacing

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none

# Distinguishable with the common forms of colour blindness (Okabe and Ito), and by marker where printed without colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_LINES = {"uniform": "-", "global": "--", "ilp": ":"}


def pareto_plot(frame: pd.DataFrame, path: Path, title: str = "") -> Path:
    """Loss over size of the whole model, one line for each method and allocation, as PNG (150 dots an inch).

    frame: as `transect.compare` returns it; rows without numbers are left out.
    The dense model is the star and the horizontal line.
    """
    from matplotlib.figure import Figure  # takes a second to import, and most commands draw nothing
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    frame = frame.dropna(subset="loss")
    dense: Any = frame[frame["method"] == "dense"]
    rest: Any = frame[frame["method"] != "dense"]
    for number, (method, group) in enumerate(rest.groupby("method", sort=False)):
        for allocation, line in group.groupby("allocation", sort=False):
            line = line.sort_values("bytes")
            label = str(method) if allocation == "uniform" else f"{method}, {allocation}"
            axes.plot(
                line["bytes"] / 1e6, line["loss"], _LINES.get(str(allocation), "-."), label=label,
                color=COLOURS[number % 7], marker=MARKERS[(number + number // 7) % 7], markersize=5,
            )  # fmt: skip
    if len(dense):
        axes.axhline(dense["loss"].iloc[0], color="0.6", linewidth=1, zorder=0)
        axes.plot(dense["bytes"] / 1e6, dense["loss"], "*", color="0.3", markersize=13, label="dense")
    losses = frame["loss"].to_numpy()
    losses = losses[losses > 0]  # the dense model's hidden states have no error
    if losses.size and losses.max() > 3 * losses.min():
        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)
    axes.set_xlabel("size of the model (MB)")
    states = frame.attrs.get("task") == "embedding"
    axes.set_ylabel("relative squared error of the last hidden states" if states else "loss (nats a prediction)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path
