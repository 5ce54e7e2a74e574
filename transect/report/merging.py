"""What a merge gave, as lines, and the losses between two models as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..store import replacing
from .pareto import COLOURS, MARKERS


def lines_of(outcome: Mapping[str, Any], folder: str) -> Iterator[str]:
    """What the method says, the losses, and the table of the curve."""
    yield f"{folder}: {', '.join(outcome['models'])} merged by {outcome['method']}"
    for words, number in outcome["told"].items():
        yield f"{words}: {number:.4g}"
    if "losses" not in outcome:
        return
    yield "loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in outcome["losses"])
    curves = outcome["curves"]
    rows = [["share of the second", *curves]]
    for number, share in enumerate(next(iter(curves.values()))["shares"]):
        rows.append([f"{share:.3g}", *(f"{curve['losses'][number]:.4f}" for curve in curves.values())])
    rows.append(["barrier", *(f"{curve['barrier']:.4f}" for curve in curves.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def barrier_plot(outcome: Mapping[str, Any], path: Path) -> Path:
    """Loss over the share of the second model, a line for each way to lie beside one another, as PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, curve) in enumerate(outcome["curves"].items()):
        axes.plot(
            curve["shares"], curve["losses"], label=f"{name}, barrier {curve['barrier']:.4f}",
            color=COLOURS[number % 7], marker=MARKERS[number % 7], markersize=5,
        )  # fmt: skip
        ends = curve["losses"][0], curve["losses"][-1]
    axes.plot([0, 1], ends, color="0.6", linestyle="--", linewidth=1)
    first, second = (Path(name).name or name for name in outcome["models"][:2])
    axes.set_xlabel(f"share of the second model, from {first} to {second}")
    axes.set_ylabel("loss (nats a prediction)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path
