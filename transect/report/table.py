"""Comparison tables, for the terminal and for a README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from rich.table import Table


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def _count(value: float) -> str:
    return f"{value:,.0f}"


# column of the data frame -> heading, and how a value is written
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("method", str),
    "allocation": ("allocation", str),
    "keep": ("keep", "{:g}".format),
    "bytes": ("bytes", _bytes),
    "parameters": ("parameters", _count),
    "loss": ("loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "accuracy": ("accuracy", "{:.2%}".format),
    "prefill_tokens_per_second": ("prefill tok/s", _count),
    "decode_tokens_per_second": ("decode tok/s", _count),
    "compress_seconds": ("compress s", "{:.1f}".format),
}


def cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and text cells; a value that does not apply (no decoding in an encoder) is a dash."""
    shown = [column for column in COLUMNS if column in frame.columns]
    rows = [
        ["-" if pd.isna(row[column]) else COLUMNS[column][1](row[column]) for column in shown]
        for _, row in frame.iterrows()
    ]
    return [COLUMNS[column][0] for column in shown], rows


def rich_table(frame: pd.DataFrame, title: str = "") -> Table:
    """For the terminal. The lowest loss of each budget is bold."""
    headings, rows = cells(frame)
    grid = Table(title=title or None, header_style="bold")
    for heading in headings:
        grid.add_column(heading, justify="left" if heading in ("method", "allocation") else "right", no_wrap=True)
    best = set(frame.groupby("keep")["loss"].idxmin()) if "keep" in frame.columns else set()
    for index, row in zip(frame.index, rows, strict=True):
        grid.add_row(*row, style="bold" if index in best else None)
    return grid


def markdown_table(frame: pd.DataFrame) -> str:
    """For a README."""
    headings, rows = cells(frame)
    left = {"method", "allocation"}
    lines = [headings, [":---" if heading in left else "---:" for heading in headings], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
