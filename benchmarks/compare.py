"""What a comparison costs on top of its parts.

Runs `transect.compare` with 5 methods at 4 budgets, and in the same process its parts alone: one statistics pass for
all methods, one factorization of each matrix a method, one evaluation a row (the 20 and the dense model).

Target: the comparison takes at most 1.15 times the sum of the parts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import llama, parser, show, token_batches, verdict

import transect
from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.compression import method
from transect.compression.factorized import ranks_of_shares
from transect.compression.frame import apply_ranks, factorize, temporarily
from transect.data import load
from transect.evaluation import evaluate
from transect.statistics import collect

METHODS = ("svd", "fwsvd", "asvd", "svd-llm", "kfac-svd")
KEEPS = (0.9, 0.8, 0.7, 0.6)


class Clock:
    """Adds up the seconds spent inside `with clock(name)`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self.started
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent


def parts(
    model: Any, methods: Sequence[str], keeps: Sequence[float], calibration: Any, held_out: Any, clock: Clock
) -> None:
    """Each part once. Choosing ranks and replacing matrices is not counted: it is the comparison's own overhead."""
    anatomy = Anatomy(model)
    matrices = anatomy.matrices()
    with clock("statistics"):
        statistics = collect(anatomy, calibration, [s for name in methods for s in method(name).needs], matrices)
    with clock("evaluation"):
        evaluate(model, held_out)
    for name in methods:
        with clock("factorization"):
            factors = factorize(matrices, method(name), method(name).settings({}), statistics)
        for keep in keeps:
            with temporarily(anatomy, matrices):
                apply_ranks(matrices, factors, ranks_of_shares(matrices, dict.fromkeys(factors, keep)))
                with clock("evaluation"):
                    evaluate(model, held_out)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Time both ways, print the table, and return the numbers."""
    options = parser(__doc__)
    options.add_argument("--model", help="folder or hub name; default a random Llama of 4 blocks")
    options.add_argument("--data", help="calibration data for --model")
    options.add_argument("--eval", help="held-out data for --model")
    options.add_argument("--hidden", type=int, help="of the random model; default 256")
    chosen = options.parse_args(argv)
    quick = chosen.quick
    calibration: Any
    held_out: Any
    if chosen.model:
        if not (chosen.data and chosen.eval):
            options.error("--model needs --data and --eval")
        opened = open_model(chosen.model)
        model, title = opened.model, chosen.model
        calibration, held_out = (
            load(data, model, opened.tokenizer, opened.processor, sequences=64, full_only=True)
            for data in (chosen.data, chosen.eval)
        )
    else:
        hidden, blocks, length = chosen.hidden or (32 if quick else 256), 1 if quick else 4, 16 if quick else 256
        model, title = llama(hidden, blocks, vocabulary=256), f"a random Llama of {blocks} blocks, hidden {hidden}"
        calibration, held_out = (
            token_batches(1 if quick else 8, 2 if quick else 8, length, 256, seed) for seed in (1, 2)
        )
    methods, keeps = (METHODS[-2:], KEEPS[-2:]) if quick else (METHODS, KEEPS)
    totals, sums, clock = [], [], Clock()
    evaluate(model, held_out)  # warm-up
    repeats = chosen.repeats or (1 if quick else 3)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            transect.compare(model, methods, keeps, calibration, held_out, Path(folder) / "run")
            totals.append(time.perf_counter() - started)
        before = sum(clock.seconds.values())
        parts(model, methods, keeps, calibration, held_out, clock)
        sums.append(sum(clock.seconds.values()) - before)
    overhead = median(total / part for total, part in zip(totals, sums, strict=True))
    rows = [[name, seconds / repeats, "-", "-"] for name, seconds in clock.seconds.items()]
    rows.append(["sum of the parts", median(sums), "-", "-"])
    rows.append(["transect.compare", median(totals), f"{overhead:.3f}", verdict(overhead <= 1.15)])
    show(
        f"{len(methods)} methods at {len(keeps)} budgets on {title}: {calibration.tokens} calibration and "
        f"{held_out.tokens} evaluation tokens",
        ["", "seconds", "/ sum of the parts", "<= 1.15"],
        rows,
    )
    return {"overhead": overhead}


if __name__ == "__main__":
    main()
