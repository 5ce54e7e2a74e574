"""The plots of a map, from its arrays alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ....probes import Result
from ....probes.draw import Drawing, Plot, Table, heatmap, lines

WORDS = {"batch-size": "batch size, from cold to hot", "learning-rate": "learning rate, from cold to hot"}


@dataclass(frozen=True)
class Shown:
    """A heat map: a figure, its title, how to read it, whether in powers of ten, whether its sign has colours."""

    name: str
    title: str
    note: str
    log: bool = False
    diverging: bool = False


MAPS = (
    Shown("training_loss", "Training loss", "High where models are too small, or trainings short or noisy.", log=True),
    Shown("held_out_error", "Held-out error", "What a user wants low: held against the phases above."),
    Shown("sharpness", "Sharpness", "Largest Hessian eigenvalue, by magnitude; if large, the loss is steep.", log=True),
    Shown("trace", "Trace of the Hessian", "Sharpness summed over all directions, by magnitude.", log=True),
    Shown(
        "connectivity", "Mode connectivity",
        "mc on the trained curve between two seeds. Negative: a barrier. Near 0: connected. Positive: under-trained.",
        diverging=True,
    ),
    Shown(
        "line_connectivity", "Connectivity along the straight line",
        "The same without training a curve: what averaging two seeds would meet.", diverging=True,
    ),
    Shown(
        "matched_connectivity", "The straight line after weight matching",
        "The second seed's neurons in the order that lies closest to the first's.", diverging=True,
    ),
    Shown("similarity", "Similarity", "Linear CKA of two seeds' held-out outputs; 1: they answer alike."),
    Shown("debiased_similarity", "Similarity, debiased", "The same by unbiased estimates: not raised by few examples."),
)  # fmt: skip


def draw(result: Result) -> list[Drawing]:
    """The phases first, then the heat maps, and the losses along the curves."""
    phases, labels = result["phase"], list(result.labels["phase"])
    rows, columns = phases.shape
    widths, hot = result.label("width", rows), result.label("temperature", columns)
    xlabel = WORDS[result.settings["temperature"]]
    places = {"x": hot, "y": widths, "xlabel": xlabel, "ylabel": "width (load falls downwards)"}
    names = [[labels[number] for number in row] for row in phases.tolist()]
    phase_plot = heatmap(
        "Phases", "Of each cell, by our thresholds. I, II: the loss is high. I, III: a barrier between seeds. IV-A: "
        "over-fitted. IV-B: generalising.", phases, **places,
    )  # fmt: skip
    phase_plot.figure.update_traces(
        text=names, texttemplate="%{text}", showscale=False, zmin=0, zmax=len(labels) - 1, hovertemplate="%{text}"
    )
    drawn: list[Drawing] = [phase_plot, *(_shown(one, result, places) for one in MAPS if one.name in result.quantities)]
    if "curve" in result.quantities:
        middle = columns // 2
        points = [f"{place / (result['curve'].shape[2] - 1):g}" for place in range(result["curve"].shape[2])]
        series = {
            f"width {width}, {word}": result[name][row, middle]
            for row, width in enumerate(widths)
            for name, word in (("curve", "curve"), ("line", "straight"))
        }
        drawn.append(
            lines(
                "Between two seeds", f"Training loss along the trained curve and the straight line, at {hot[middle]}.",
                series, x=points, xlabel="t, from one seed to the other", ylabel="training loss (nats)",
            )
        )  # fmt: skip
    return [*drawn, _table(result, names, widths, hot)]


def _shown(one: Shown, result: Result, places: dict) -> Plot:
    values: Tensor = result[one.name]
    unit = result.quantities[one.name].unit
    shown = values.abs().log10() if one.log else values
    plot = heatmap(
        one.title, one.note + (" Colours by powers of ten." if one.log else ""), shown, **places,
        unit=f"log10 {unit}" if one.log else unit, diverging=one.diverging,
    )  # fmt: skip
    plot.figure.update_traces(
        text=[[f"{value:.3g}" for value in row] for row in values.tolist()], texttemplate="%{text}",
        hovertemplate="%{text}",
    )  # fmt: skip
    return plot


def _table(result: Result, names: list[list[str]], widths: list[str], hot: list[str]) -> Table:
    """The raw numbers of every cell beside its phase."""
    columns = ("initial_loss", "training_loss", "sharpness", "connectivity", "similarity", "held_out_error")
    rows = [
        [width, one, names[row][column], *(_number(result, name, row, column) for name in columns)]
        for row, width in enumerate(widths)
        for column, one in enumerate(hot)
    ]
    return Table(
        "Every cell", "The numbers from which the phases are told.",
        ["width", "temperature", "phase", *(name.replace("_", " ") for name in columns)], rows,
    )  # fmt: skip


def _number(result: Result, name: str, row: int, column: int) -> float | str:
    if name not in result.quantities:
        return "–"
    value = float(result[name][row, column])
    return float(f"{value:.4g}") if value == value else "–"
