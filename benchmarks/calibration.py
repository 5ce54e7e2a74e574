"""What collecting statistics costs, next to a plain pass over the same data in float32.

Input covariances are compared with a forward pass and its loss under no_grad; both K-FAC factors with a forward and
backward pass that computes every weight gradient. The column FLOPs has the same ratio in multiply-adds of matrix
products: the floor where these take all the time. Softmax, norms and the like are in both passes and uncounted; they
bring the measured ratio nearer to 1, even below that floor.

The line below the table is about the first model's K-FAC factors with `torch.set_float32_matmul_precision("medium")`,
which lets processors with bfloat16 instructions use them: whether that is faster, and what it changes in the result.

Targets: 2 for either ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from common import alternate, gpt2, llama, parser, ratio, show, token_batches, verdict
from flops import count

import transect
from transect.anatomy import Anatomy
from transect.data import Batches
from transect.forward import predictions, summed_loss
from transect.statistics import InputCovariance, OutputGradientCovariance, collect, key_of

COVARIANCE = (InputCovariance(),)
KFAC = (InputCovariance(), OutputGradientCovariance())
SUMS = (torch.float32, torch.float64)


def plain_forward(model: Any, batches: Batches) -> None:
    """What a pass without statistics costs: the loss of every batch."""
    with torch.no_grad():
        for batch in batches:
            summed_loss(*predictions(model, batch)).item()


def plain_backward(model: Any, batches: Batches) -> None:
    """The same with the gradients of all weights."""
    for batch in batches:
        summed_loss(*predictions(model, batch)).backward()
        model.zero_grad(set_to_none=True)


@contextmanager
def medium_precision() -> Iterator[None]:
    """Matrix products in bfloat16 inside, where the processor has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(name: str, model: Any, batches: Batches, repeats: int) -> list[list[Any]]:
    """The rows of one model."""
    anatomy = Anatomy(model)
    floors = count(anatomy, batches.batches[0]["input_ids"].shape[1])
    candidates: dict[str, Callable[[], Any]] = {
        "forward": lambda: plain_forward(model, batches),
        "backward": lambda: plain_backward(model, batches),
    }
    for label, wanted in (("covariance", COVARIANCE), ("K-FAC", KFAC)):
        for dtype in SUMS:
            candidates[f"{label} {dtype}"] = lambda wanted=wanted, dtype=dtype: collect(
                anatomy, batches, wanted, accumulate=dtype
            )
    seconds = alternate(candidates, repeats)
    rows = []
    for label, plain, floor in (
        ("covariance", "forward", floors.covariance_floor),
        ("K-FAC", "backward", floors.kfac_floor),
    ):
        for dtype in SUMS:
            mine = f"{label} {dtype}"
            measured = ratio(seconds, mine, plain)
            rows.append(
                [
                    name, "input covariances" if label == "covariance" else "both K-FAC factors",
                    str(dtype).removeprefix("torch."), median(seconds[plain]), median(seconds[mine]), measured, floor,
                    verdict(measured <= 2),
                ]
            )  # fmt: skip
    return rows


def reduced_precision(model: Any, batches: Batches, repeats: int) -> str:
    """One line: what medium precision gains, and what it changes in the factorizations made from it."""

    def run() -> Any:
        return collect(anatomy, batches, KFAC)

    def run_medium() -> Any:
        with medium_precision():
            return collect(anatomy, batches, KFAC)

    anatomy = Anatomy(model)
    gain = ratio(alternate({"highest": run, "medium": run_medium}, repeats), "highest", "medium")
    exact, other = run(), run_medium()
    worst = 0.0
    for matrix in anatomy.matrices():
        for statistic in KFAC:
            a, b = (store.value(key_of(matrix, statistic), statistic) for store in (exact, other))
            worst = max(worst, float((a - b).norm() / a.norm()))
    line = f"float32 products at precision 'medium': {gain:.2f} times faster, factors differ by {worst:.1e} at most"
    if worst < 1e-5:  # bfloat16 products are off by 1e-3, float32 ones in another order by 1e-6
        return f"{line}: the products stayed in float32 on this processor, so it offers no faster option"
    losses, ranks = [], []
    for precision in (nullcontext, medium_precision):
        compressed = copy.deepcopy(model)
        with precision():
            transect.compress(compressed, "kfac-svd", 0.6, batches, allocation="global")
        ranks.append([getattr(matrix.module, "rank", None) for matrix in Anatomy(compressed).matrices()])
        with torch.no_grad():
            losses.append(sum(float(summed_loss(*predictions(compressed, b))) for b in batches) / batches.tokens)
    changed = sum(a != b for a, b in zip(*ranks, strict=True))
    return (
        f"{line}; of kfac-svd with global allocation at keep 0.6, {changed} of {len(ranks[0])} ranks change, and the "
        f"calibration loss goes from {losses[0]:.6f} to {losses[1]:.6f}"
    )


def main(argv: Sequence[str] | None = None) -> list[list[Any]]:
    """Measure both models at every width, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, nargs="+", help="default 512 1024")
    options.add_argument("--blocks", type=int, help="default 4")
    options.add_argument("--length", type=int, help="tokens in a sequence; default 512")
    options.add_argument("--batch-size", type=int, help="default 8")
    options.add_argument("--batches", type=int, help="default 2")
    chosen = options.parse_args(argv)
    quick = chosen.quick
    blocks, length = chosen.blocks or (2 if quick else 4), chosen.length or (32 if quick else 512)
    repeats = chosen.repeats or (1 if quick else 5)
    batches = token_batches(chosen.batches or (1 if quick else 2), chosen.batch_size or (2 if quick else 8), length)
    rows, note = [], ""
    for hidden in chosen.hidden or ([64] if quick else [512, 1024]):
        for name, make in (("llama", llama), ("gpt2", gpt2)):
            model = make(hidden, blocks)
            rows += measure(f"{name}, hidden {hidden}", model, batches, repeats)
            note = note or reduced_precision(model, batches, repeats)
    show(
        f"Statistics against a plain pass: {blocks} blocks, {len(batches)} batches of "
        f"{'x'.join(map(str, batches.batches[0]['input_ids'].shape))} tokens",
        ["model", "statistics", "sums in", "plain s", "with them s", "ratio", "FLOPs", "<= 2"],
        rows,
        [note],
    )
    return rows


if __name__ == "__main__":
    main()
