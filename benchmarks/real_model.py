"""The README's tables and plot of SmolLM2 from `docs/smollm2.csv`, and run folders of `compare` added to that file.

    python benchmarks/real_model.py                 # tables and plot anew
    python benchmarks/real_model.py run/ other/     # the rows of these folders first, in the place of older ones

A row of the file is one of a comparison: loss over the dense model's on the held-out text and on another one (with
standard errors, in nats a prediction), the share of facts still said, the share of the matrices' bytes, tokens a
second, seconds. What was not measured is empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from envelope import rows_of as finished
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from transect.evaluation import standard_error
from transect.report.pareto import COLOURS, MARKERS
from transect.store import replacing, write_text

ROOT = Path(__file__).parent.parent
KEY = ["method", "allocation", "keep"]
MEASURED: dict[Any, int] = {  # and the digits that are kept
    "kept": 4, "over_dense": 4, "over_dense_error": 4, "facts": 4, "also_dense": 4, "also_over_dense": 4,
    "also_over_dense_error": 4, "prefill_tokens_per_second": 0, "decode_tokens_per_second": 1, "compress_seconds": 0,
}  # fmt: skip
FEW_BITS, SHARES = ("mixed", "gptq", "rtn"), (0.55, 0.42, 0.375, 0.281, 0.219, 0.19, 0.15)

Row = Mapping[str, Any]


def rows_of(folder: Path) -> pd.DataFrame:
    """The rows of a run folder that have numbers; `also_`: on its other text, if it has one."""
    rows = finished(folder)
    dense = next(row for row in rows if row["method"] == "dense")
    text = next(iter(dense.get("also", {})), None)
    found = []
    for row in rows:
        made = row | dict(zip(("over_dense", "over_dense_error"), _over(row, dense), strict=True))
        if text is not None:
            here, there = row["also"][text], dense["also"][text]
            over, error = _over(here, there)
            made |= {"also_dense": there["loss"], "also_over_dense": over, "also_over_dense_error": error}
        found.append(made)
    return pd.DataFrame(found).reindex(columns=[*KEY, *MEASURED])


def _over(row: Row, dense: Row) -> tuple[float, float]:
    """Loss over dense, and its standard error over the sequences."""
    return row["loss"] - dense["loss"], standard_error(row["examples"], dense["examples"]) or 0.0


def together(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """All rows, of one method, allocation and share the last."""
    every = pd.concat(frames).drop_duplicates(KEY, keep="last").round(MEASURED)
    return every.sort_values(KEY, ascending=[True, True, False], ignore_index=True)


def by_method(rows: Iterable[Row], shares: Sequence[float]) -> list[str]:
    """Markdown: a line a method and allocation, those that lose least first, and a column a share."""
    lines = [
        [f"`{method}`", allocation, *(_cell(at.get(share)) for share in shares)]
        for (method, allocation), at in _sorted(row for row in rows if row["keep"] in shares)
    ]
    return _markdown(["method", "allocation", *(f"{share:g}" for share in shares)], lines, text=2)


def by_share(rows: Iterable[Row], methods: Sequence[str], shares: Sequence[float]) -> list[str]:
    """Markdown: a line a share, and a column a method."""
    found = {(row["keep"], row["method"]): row for row in rows}
    lines = [[f"{share:g}", *(_cell(found.get((share, method)), True) for method in methods)] for share in shares]
    return _markdown(["keep", *(f"`{method}`" for method in methods)], lines)


def speeds(rows: Iterable[Row], share: float) -> list[str]:
    """Markdown: the dense model and a line a method at one share, with measured speeds and the seconds it took."""
    chosen = [row for row in rows if row["keep"] in (1, share) and row["prefill_tokens_per_second"] > 0]
    lines = [
        [
            f"`{row['method']}`{_stored(row)}", row["allocation"], _loss(row, "over_dense"), _facts(row),
            f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_tokens_per_second']:,.0f}",
            f"{row['compress_seconds']:,.0f}",
        ]
        for row in sorted(chosen, key=lambda row: row["over_dense"])
    ]  # fmt: skip
    heading = [f"method at {share:g}", "allocation", "over dense", "facts", "tokens/s, reading", "writing", "seconds"]
    return _markdown(heading, lines, text=2)


def _sorted(rows: Iterable[Row]) -> list[tuple[tuple[str, str], dict[float, Row]]]:
    """The rows by share of each method and allocation; those that lose least at their largest share first."""
    found: dict[tuple[str, str], dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: -row["keep"]):
        found.setdefault((row["method"], row["allocation"]), {})[row["keep"]] = row
    return sorted(found.items(), key=lambda one: next(iter(one[1].values()))["over_dense"])


def _cell(row: Row | None, fine: bool = False) -> str:
    """Loss over dense and its error, facts still said, loss over dense on the other text, and in brackets the share.

    fine: the other text's with its error, too.
    """
    if row is None:
        return ""
    parts = [_loss(row, "over_dense"), _facts(row)]
    if pd.notna(row["also_over_dense"]):
        parts.append(_loss(row, "also_over_dense") if fine else f"{row['also_over_dense']:+.2f}")
    return ", ".join(parts) + _stored(row)


def _loss(row: Row, name: str) -> str:
    return "0" if row["method"] == "dense" else f"{row[name]:+.3f} ± {row[f'{name}_error']:.3f}"


def _facts(row: Row) -> str:
    return f"{100 * row['facts']:.0f} %"


def _stored(row: Row) -> str:
    """What was stored, where that is clearly less than the share."""
    return f" ({row['kept']:.3f})" if row["kept"] < 0.985 * row["keep"] else ""


def _markdown(heading: Sequence[str], lines: Sequence[Sequence[str]], text: int = 0) -> list[str]:
    """text: so many columns at the left are words, the others numbers."""
    rule = [":---"] * text + ["---:"] * (len(heading) - text)
    return [f"| {' | '.join(line)} |" for line in (heading, rule, *lines)]


def plot(rows: Iterable[Row], path: Path) -> None:
    """Loss over dense (linear up to 0.01, then logarithmic) over the share stored, a line a method and allocation.

    Between two rows lies what somebody has who mixes their answers: straight in nats, and so bent here.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots()
    for number, ((method, allocation), at) in enumerate(_sorted(row for row in rows if row["method"] != "dense")):
        kept, lost = np.array(sorted((row["kept"], row["over_dense"]) for row in at.values())).T
        colour, between = COLOURS[number % 7], np.linspace(kept[0], kept[-1], 400)
        axes.plot(
            between, np.interp(between, kept, lost), color=colour, linewidth=2 if method == "mixed" else 0.8,
            linestyle=["-", "--", "-.", ":"][number // 7 % 4],
        )  # fmt: skip
        axes.plot(
            kept, lost, MARKERS[(number + number // 7) % 7], color=colour, markersize=5,
            label=method if allocation == "uniform" else f"{method}, {allocation}",
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axhline(0, color="0.6", linewidth=1, zorder=0)
    axes.set_xlabel("share of the bytes of the blocks' matrices in bfloat16")
    axes.set_ylabel("loss over the dense model's (nats a prediction)")
    axes.set_title("SmolLM2-135M: every method, few bits and structures")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Write the file, the plot and README's tables. root: the folder that has docs/ and README.md."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, nargs="*", help="run folders of `compare`")
    kept = root / "docs" / "smollm2.csv"
    frame = together([pd.read_csv(kept), *map(rows_of, options.parse_args(argv).runs)])
    write_text(kept, frame.to_csv(index=False))
    rows: list[Any] = frame.to_dict("records")
    plot(rows, root / "docs" / "smollm2.png")
    structures = [row for row in rows if row["method"] not in FEW_BITS]
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name, lines in {
        "few bits": by_share(rows, FEW_BITS, SHARES),
        "0.8": speeds(structures, 0.8),
        "structures": by_method(structures, (0.9, 0.8, 0.6)),
        "both": by_method(rows, (0.5, 0.375, 0.25, 0.19)),
    }.items():
        before, rest = readme.split(f"<!-- smollm2: {name} -->\n")
        after = rest[rest.index("<!-- end -->") :]
        readme = f"{before}<!-- smollm2: {name} -->\n" + "\n".join([*lines, after])
    write_text(root / "README.md", readme)


if __name__ == "__main__":
    main()
