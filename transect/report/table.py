"""Comparison tables, for the terminal and for a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .lengths import COSTS, costs
from .number import in_bytes, in_millions

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none


def _count(value: float) -> str:
    return f"{value:,.0f}"


# column of the data frame -> heading, and how a value is written
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("method", str),
    "allocation": ("allocation", str),
    "keep": ("keep", "{:g}".format),
    "kept": ("kept", "{:.3f}".format),
    "bytes": ("bytes", in_bytes),
    "parameters": ("parameters", in_millions),
    "loss": ("loss", "{:.4f}".format),
    "over_dense": ("over dense", "{:+.4f}".format),
    "over_dense_error": ("std. error", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "accuracy": ("accuracy", "{:.2%}".format),
    "facts": ("facts known", "{:.1%}".format),
    "prefill_tokens_per_second": ("prefill tokens/s", _count),
    "decode_tokens_per_second": ("decode tokens/s", _count),
    "active_parameters": ("active", in_millions),
    "flops": ("FLOPs/token", in_millions),
    "cache_bytes": ("cache/token", in_bytes),
    "compress_seconds": ("compress seconds", "{:.1f}".format),
}


# A method whose steps are whole sublayers or blocks may keep less than it was allowed; by this much it is shown.
_COARSE = 0.01
_LEFT = ("method", "allocation")  # columns of words


def notes(frame: Any) -> list[str]:
    """What shares are of, what facts are counted, what to know of methods, why rows have no numbers; a line each."""
    import pandas as pd

    lines = []
    if shares := frame.attrs.get("shares"):
        lines.append(f"keep: share of the bytes of the blocks' matrices in {shares}")
    if frame.attrs.get("task") == "embedding":
        lines.append("loss: squared distance of the last hidden states from the dense model's, over their own square")
    if asked := frame.attrs.get("facts"):
        lines.append(f"facts known: of {asked['known']:,} that the dense model knows, out of {asked['asked']:,}")
    lines += frame.attrs.get("notes", [])
    if "note" in frame.columns:
        missing = frame[frame["note"].notna()]
        lines += [
            f"{row['method']}{'' if pd.isna(row['keep']) else f' at {row.keep:g}'}: {row['note']}"
            for _, row in missing.iterrows()
        ]
    return lines


def cells(frame: Any) -> tuple[list[str], list[list[str]]]:
    """Headings and text cells of a DataFrame; a value that does not apply (no decoding in an encoder) is a dash."""
    import pandas as pd

    idle = set()
    if frame.attrs.get("task") == "embedding":  # of which the dense model has no loss
        idle |= {"over_dense", "perplexity"}
    if set(frame["allocation"] if "allocation" in frame.columns else ()) <= {"-", "uniform"}:
        idle.add("allocation")
    if frame["decode_tokens_per_second"].notna().any():  # a language model is judged by its perplexity
        idle.add("accuracy")
    if "kept" in frame.columns and not (frame["keep"] - frame["kept"] > _COARSE).any():  # every budget was used up
        idle.add("kept")
    if "prefill_tokens_per_second" in frame.columns and frame["prefill_tokens_per_second"].isna().all():  # not measured
        idle |= {"prefill_tokens_per_second", "decode_tokens_per_second", "accuracy"}
    if frame.attrs.get("beside"):  # models of other kinds: what they cost to run, in place of what cannot be compared
        idle = idle - {"kept"} | {"perplexity", "compress_seconds"}
    else:
        idle |= {"active_parameters", "flops", "cache_bytes"}
    shown = [column for column in COLUMNS if column in frame.columns and column not in idle]
    headed = {column: COLUMNS[column] for column in shown}
    if frame.attrs.get("task") == "embedding" and "accuracy" in headed:
        headed["accuracy"] = "cosine", "{:.4f}".format
    for column in frame.columns:  # of further texts: "over_dense, novels"
        base, _, text = column.partition(", ")
        if text and base in ("over_dense", "over_dense_error"):
            headed[column] = f"{COLUMNS[base][0]}, {text}", COLUMNS[base][1]
    rows = [
        ["-" if pd.isna(row[column]) else write(row[column]) for column, (_, write) in headed.items()]
        for _, row in frame.iterrows()
    ]
    return [heading for heading, _ in headed.values()], rows


def cells_at_lengths(frame: Any) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what rows cost at each length of prompt, beside the first, the dense model."""
    import pandas as pd

    words = {"method": str, "allocation": str, "keep": "{:g}".format}
    if set(frame["allocation"]) <= {"-", "uniform"}:
        del words["allocation"]
    rows, dense = [], frame.iloc[0]
    for length in frame.attrs["lengths"]:
        whole = {key: dense[f"{key} at {length}"] for key in COSTS}
        for index, row in frame.iterrows():
            measured = {key: row[f"{key} at {length}"] for key in COSTS}
            if not any(map(pd.isna, measured.values())):
                named = ["-" if pd.isna(row[word]) else write(row[word]) for word, write in words.items()]
                rows.append([f"{length:,}", *named, *costs(measured, None if index == frame.index[0] else whole)])
    return ["prompt", *words, *(heading for heading, _ in COSTS.values())], rows


def rich_lengths(frame: pd.DataFrame) -> Table:
    """For the terminal: what rows cost at each length of prompt, and in brackets over the dense model."""
    headings, rows = cells_at_lengths(frame)
    return grid(headings, rows, "at each length of prompt (x: over the dense model)", [], [False] * len(rows))


def rich_table(frame: pd.DataFrame, title: str = "") -> Table:
    """For the terminal. The lowest loss of each budget is bold. Print with crop=False: no number is ever cut.

    Headings break between words where it gets narrow; a full table needs about 100 columns.
    """
    best = set(frame.dropna(subset="loss").groupby("keep")["loss"].idxmin()) if "keep" in frame.columns else set()
    return grid(*cells(frame), title, notes(frame), [index in best for index in frame.index])


def grid(
    headings: Sequence[str], rows: Sequence[Sequence[str]], title: str, notes: Sequence[str], bold: Sequence[bool]
) -> Table:
    """Cells of text as a table for the terminal, some rows bold."""
    found = Table(
        title=title or None, caption="\n".join(notes) or None, caption_justify="left",
        header_style="bold", box=SIMPLE_HEAD, padding=0, pad_edge=False,
    )  # fmt: skip
    for column, heading in enumerate(headings):
        justify = "left" if heading in _LEFT else "right"
        width = max(map(len, [*heading.split(), *(row[column] for row in rows)]))
        found.add_column(heading, justify=justify, vertical="bottom", min_width=width)
    for strong, row in zip(bold, rows, strict=True):
        found.add_row(*row, style="bold" if strong else None)
    return found


def markdown_table(frame: pd.DataFrame) -> str:
    """For a README; costs at lengths of prompts in a second table."""
    found = markdown(*cells(frame), notes(frame))
    return found + "\n" + markdown(*cells_at_lengths(frame), []) if frame.attrs.get("lengths") else found


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Cells of text as a Markdown table."""
    lines = [headings, [":---" if heading in _LEFT else "---:" for heading in headings], *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return table + "".join(f"\n{note}\n" for note in notes)
