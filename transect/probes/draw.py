"""How results are drawn: plotly figures and tables in one style. The report sets their colours, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plot:
    """A figure with a heading and a sentence on how to read it. figure: `plotly.graph_objects.Figure`."""

    title: str
    note: str
    figure: Any


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers with a heading and a sentence on how to read them."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Listing:
    """Text that is shown as it stands, such as a program, with a heading and a sentence on how to read it."""

    title: str
    note: str
    text: str


Drawing = Plot | Table | Listing
COLOURS = 8  # of a report; more lines than that are told apart by a scale, in their order, and few of them are named


def lines(
    title: str,
    note: str,
    series: Mapping[str, Any],
    *,
    x: Sequence[Any] | None = None,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Plot:
    """One line a series, over a common x (default 0, 1, 2 ...; words at equal distances). log: a logarithmic y axis."""
    from plotly import graph_objects as go

    figure, styles = go.Figure(), _styles(len(series))
    for (name, values), style in zip(series.items(), styles, strict=True):
        y = numbers(values)
        figure.add_scatter(x=list(range(len(y)) if x is None else x), y=y, name=name, **style)
    places = range(max(map(len, series.values()), default=0)) if x is None else x
    if places and all(isinstance(place, int) for place in places) and max(places) - min(places) <= 24:
        figure.update_xaxes(dtick=1)  # no ticks between whole numbers
    if any(isinstance(place, str) for place in places):
        figure.update_xaxes(type="category")  # plotly would read "5%" and "2-3" as numbers
    figure.update_xaxes(title=xlabel)
    figure.update_yaxes(title=ylabel, type="log" if log else "linear")
    return Plot(title, note, figure)


def _styles(count: int) -> list[dict[str, Any]]:
    """How each of so many lines is drawn."""
    if count <= COLOURS:
        return [{"mode": "lines+markers"}] * count
    from plotly.colors import sample_colorscale

    scale = sample_colorscale("Viridis", [number / (count - 1) for number in range(count)])
    named = {round(part * (count - 1) / 4) for part in range(5)}
    return [
        {"mode": "lines", "line": {"color": colour}, "showlegend": number in named}
        for number, colour in enumerate(scale)
    ]


def bars(
    title: str, note: str, series: Mapping[str, Any], *, x: Sequence[Any] | None = None, xlabel: str, ylabel: str
) -> Plot:
    """Bars side by side, one colour a series."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, values in series.items():
        y = numbers(values)
        figure.add_bar(x=list(range(len(y)) if x is None else x), y=y, name=name)
    figure.update_xaxes(title=xlabel)
    figure.update_yaxes(title=ylabel)
    return Plot(title, note, figure)


def heatmap(
    title: str,
    note: str,
    values: Any,
    *,
    x: Sequence[Any] | None = None,
    y: Sequence[Any] | None = None,
    xlabel: str,
    ylabel: str,
    unit: str = "",
    diverging: bool = False,
) -> Plot:
    """A matrix (rows x columns) as colours, the first row on top. diverging: zero is neutral and signs have colours."""
    from plotly import graph_objects as go

    table = torch.as_tensor(values).detach().cpu()
    rows, columns = table.shape
    figure = go.Figure(
        go.Heatmap(
            z=numbers(table), x=[str(v) for v in (range(columns) if x is None else x)],
            y=[str(v) for v in (range(rows) if y is None else y)], colorbar={"title": unit},
            colorscale="RdBu_r" if diverging else "Viridis", zmid=0 if diverging else None,
        )
    )  # fmt: skip
    figure.update_xaxes(title=xlabel, type="category")
    figure.update_yaxes(title=ylabel, type="category", autorange="reversed")
    return Plot(title, note, figure)


def scatter(
    title: str,
    note: str,
    groups: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    texts: Mapping[str, Sequence[str]] | None = None,
    log: bool = False,
) -> Plot:
    """Points (x, y) by group. texts: what is shown on hovering over each. log: logarithmic axes."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, (x, y) in groups.items():
        text = None if texts is None else list(texts[name])
        figure.add_scatter(x=numbers(x), y=numbers(y), name=name, mode="markers", text=text)
    kind = "log" if log else "linear"
    figure.update_xaxes(title=xlabel, type=kind)
    figure.update_yaxes(title=ylabel, type=kind)
    return Plot(title, note, figure)


def numbers(values: Any) -> Any:
    """As plain (nested) lists; what is not finite becomes a gap."""
    if isinstance(values, Tensor):
        return numbers(values.detach().cpu().tolist())
    if isinstance(values, (list, tuple)):
        return [numbers(value) for value in values]
    value = float(values)
    return value if value - value == 0 else None
