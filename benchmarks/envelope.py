"""Is `mixed` on or below the lower envelope of everything else in a comparison? Reads a run folder of `compare`.

    transect compare MODEL --methods mixed,gptq,rtn,... --keep ... --out run/
    python benchmarks/envelope.py run/

The envelope at a share of the bytes is the least loss that the other rows have there or to the left of it, or that a
line between two of them has: somebody who mixes two models' answers can have that. Differences are taken sequence by
sequence, and their standard errors likewise. A table for the held-out data, and one for each text given by `--also`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import show, verdict

from transect.evaluation import standard_error

Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """The rows that have numbers."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "rows").glob("*.json"))]
    return [row for row in found if "examples" in row]


def envelope(others: Sequence[Row], share: float) -> tuple[list[tuple[float, int]], str]:
    """What the best of the other rows, or of the lines between two of them, makes of each example at a share."""
    best: tuple[float, list[tuple[float, int]], str] = (math.inf, [], "")
    for candidate, name in _candidates(others, share):
        loss = sum(nats for nats, _ in candidate) / sum(count for _, count in candidate)
        best = min(best, (loss, candidate, name), key=lambda one: one[0])
    return best[1], best[2]


def _candidates(others: Sequence[Row], share: float) -> Iterator[tuple[list[tuple[float, int]], str]]:
    for left in others:
        if left["kept"] > share:
            continue
        yield [tuple(pair) for pair in left["examples"]], _name(left)
        for right in others:
            if right["kept"] > share:
                weight = (share - left["kept"]) / (right["kept"] - left["kept"])
                mixed = [
                    ((1 - weight) * a + weight * b, count)
                    for (a, count), (b, _) in zip(left["examples"], right["examples"], strict=True)
                ]
                yield mixed, f"{_name(left)} to {_name(right)}"


def _name(row: Row) -> str:
    return f"{row['method']} {row['kept']:.3f}"


def on(rows: Sequence[Row], text: str) -> list[Row]:
    """The rows with their loss and examples on another text; "" for the held-out data itself."""
    return [{**row, **row["also"][text]} if text else row for row in rows if not text or text in row.get("also", {})]


def against_envelope(rows: Sequence[Row], method: str, title: str) -> dict[float, float]:
    """Print one table; returns the method's difference to the envelope by share kept."""
    dense = next(row for row in rows if row["method"] == "dense")
    mine = sorted((row for row in rows if row["method"] == method), key=lambda row: -row["kept"])
    others = [row for row in rows if row["method"] != method]
    table, found = [], {}
    for row in mine:
        best, name = envelope(others, row["kept"])
        if not best:
            continue
        count = sum(number for _, number in best)
        difference = row["loss"] - sum(nats for nats, _ in best) / count
        error = standard_error([tuple(pair) for pair in row["examples"]], best) or math.nan
        found[row["kept"]] = difference
        table.append(
            [
                f"{row['kept']:.4f}", f"{row['loss'] - dense['loss']:+.4f}",
                f"{row['loss'] - dense['loss'] - difference:+.4f}", name, f"{difference:+.4f}", f"{error:.4f}",
                f"{difference / error:+.1f}", verdict(difference <= 0),
            ]
        )  # fmt: skip
    show(title, ["kept", method, "envelope", "which is", "difference", "std. error", "in errors", "<= 0"], table)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, dict[float, float]]:
    """Print the tables; returns the differences to the envelope by text ("" is the held-out data) and share kept."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--method", default="mixed", help="default mixed")
    chosen = options.parse_args(argv)
    rows = rows_of(chosen.folder)
    title = f"{chosen.method} against the lower envelope of the other rows of {chosen.folder.name}"
    return {
        text: against_envelope(on(rows, text), chosen.method, f"{title}: loss over dense{text and ', on ' + text}")
        for text in ("", *dict.fromkeys(name for row in rows for name in row.get("also", {})))
    }


if __name__ == "__main__":
    main()
