"""The training loop against Hugging Face's Trainer: seconds a step and peak memory; LIFT's state and steps; resuming.

The same model, batches and optimizer (AdamW, full precision, clipped gradients, cosine), everything trained.

- time: each trains for some steps and for twice as many, in turn in one process; a step is the difference over the
  steps, so that neither's start and end counts. Target: at most 1.05 times Trainer's.
- memory: each in a process of its own; peak resident memory. Target: at most 1.05 times Trainer's. The loop keeps the
  best state, which Trainer is not asked to.
- `lift` at 5 % of the entries: bytes of the optimizer's state over those of full AdamW for the same matrices (target:
  1.3 times the share, and the indices beside it), and seconds a step over full AdamW's.
- a run that is interrupted in the middle and gone on with, against one that was not: every number bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Seconds, alternate, apart, llama, parser, ratio, show, token_batches, verdict
from streaming import peak
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

import transect

RATE, SHARE, MB = 1e-4, 0.05, 1e6


def ours(model: Any, tokens: Tensor, batch: int, method: str = "full", **more: Any) -> Any:
    """Train with the loop on all but the last sequences, which are held out. tokens: n x length."""
    given = dict(lr=RATE, batch_size=batch, epochs=10**6, every=10**6, device="cpu")
    return transect.adapt(model, method, tokens, **{**given, **more})


def trainers(model: Any, tokens: Tensor, batch: int, steps: int) -> None:
    """Train with Hugging Face's Trainer, which measures nothing and keeps nothing."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=steps, learning_rate=RATE, max_grad_norm=1.0,
            lr_scheduler_type="cosine", save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def run(which: str, model: Any, tokens: Tensor, batch: int, steps: int) -> None:
    """One of both."""
    if which == "ours":
        ours(model, tokens, batch, steps=steps)
    else:
        trainers(model, tokens, batch, steps)


def a_step(seconds: Seconds, steps: int) -> Seconds:
    """Of runs "NAME steps" and "NAME 2 * steps": the seconds of a step."""
    names = dict.fromkeys(name.rpartition(" ")[0] for name in seconds)
    return {
        name: [(b - a) / steps for a, b in zip(seconds[f"{name} {steps}"], seconds[f"{name} {2 * steps}"], strict=True)]
        for name in names
    }


def peak_here(which: str, sizes: dict[str, int]) -> None:
    """Train, and print the peak."""
    run(which, llama(sizes["hidden"], sizes["blocks"]), _tokens(sizes), sizes["batch"], 4)
    print(json.dumps({"peak": peak()}))


def _tokens(sizes: dict[str, int]) -> Tensor:
    batches = token_batches(12, sizes["batch"], sizes["length"])
    return torch.cat([one["input_ids"] for one in batches])


def against_trainer(sizes: dict[str, int], steps: int, repeats: int) -> None:
    """Time and memory."""
    tokens, batch = _tokens(sizes), sizes["batch"]

    def training(which: str, steps: int) -> Callable[[], None]:
        return lambda: run(which, llama(sizes["hidden"], sizes["blocks"]), tokens, batch, steps)

    names = [(which, count) for which in ("ours", "Trainer") for count in (steps, 2 * steps)]
    seconds = alternate({f"{which} {count}": training(which, count) for which, count in names}, repeats)
    each = a_step(seconds, steps)
    slower = ratio(each, "ours", "Trainer")
    peaks = {which: apart(__file__, "--peak", {"which": which, "sizes": sizes})["peak"] for which in each}
    larger = peaks["ours"] / peaks["Trainer"]
    rows = [
        [which, sorted(each[which])[len(each[which]) // 2], f"{peaks[which] / MB:.0f}"] for which in ("Trainer", "ours")
    ]
    show(
        f"Training a Llama of hidden {sizes['hidden']}, {sizes['blocks']} blocks, batches of {batch} x "
        f"{sizes['length']}, AdamW on everything",
        ["loop", "s/step", "peak MB"],
        rows,
        [f"ours / Trainer: time {slower:.3f} ({verdict(slower <= 1.05)}), memory {larger:.3f} "
         f"({verdict(larger <= 1.05)}); target 1.05"],
    )  # fmt: skip


def lift(sizes: dict[str, int], steps: int, repeats: int) -> None:
    """State and steps of LIFT beside full AdamW on the same matrices."""
    tokens, batch, found = _tokens(sizes), sizes["batch"], {}
    matrices = [m.shape for m in transect.Anatomy(llama(sizes["hidden"], sizes["blocks"])).matrices()]
    entries = sum(d_out * d_in for d_out, d_in in matrices)
    rank = max(1, round(SHARE * entries / sum(d_out + d_in for d_out, d_in in matrices)))  # as many numbers as LoRA's

    def training(method: str, steps: int) -> Callable[[], None]:
        def train() -> None:
            model = llama(sizes["hidden"], sizes["blocks"])
            given: dict[str, Any] = {"rank": rank, "interval": 10**6} if method == "lift" else {}
            found[method] = ours(model, tokens, batch, method, steps=steps, **given).outcome

        return train

    names = [(method, count) for method in ("lift", "full") for count in (steps, 2 * steps)]
    seconds = alternate({f"{method} {count}": training(method, count) for method, count in names}, repeats)
    each, rows = a_step(seconds, steps), []
    for name, outcome in found.items():
        of_number = outcome["optimizer_bytes"] / outcome["trained"]
        rows.append([name, outcome["trained"], f"{outcome['optimizer_bytes'] / MB:.1f}", f"{of_number:.2f}",
                     sorted(each[name])[repeats // 2]])  # fmt: skip
    trained, share = found["lift"]["trained"] / entries, found["lift"]["optimizer_bytes"] / (8 * entries)
    show(
        f"LIFT at {trained:.1%} of the entries, hidden {sizes['hidden']}",
        ["method", "trained", "state MB", "bytes a number", "s/step"],
        rows,
        [f"state over AdamW's of the same matrices: {share:.4f} ({verdict(share <= 1.3 * trained)}; at most 1.3 x the "
         f"share); steps over full AdamW's: {ratio(each, 'lift', 'full'):.3f}"],
    )  # fmt: skip


def resumed(sizes: dict[str, int], steps: int) -> None:
    """An interrupted run and one that was not."""
    tokens, batch = _tokens(sizes), sizes["batch"]
    whole = llama(sizes["hidden"], sizes["blocks"])
    again = llama(sizes["hidden"], sizes["blocks"])
    ours(whole, tokens, batch, steps=2 * steps, every=steps)

    def stop(check: Any) -> None:
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = dict(steps=2 * steps, every=steps, checkpoint=str(Path(folder) / "state"))
        try:
            ours(again, tokens, batch, on_check=stop, **given)
        except KeyboardInterrupt:
            again = llama(sizes["hidden"], sizes["blocks"])
            ours(again, tokens, batch, **given)
    pairs = zip(whole.state_dict().items(), again.state_dict().values(), strict=True)
    same = sum(torch.equal(ours, theirs) for (_, ours), theirs in pairs)
    count = len(whole.state_dict())
    show(
        "A run interrupted in the middle and gone on with, beside an uninterrupted one",
        ["tensors", "equal bit for bit", "all"],
        [[count, same, verdict(same == count)]],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = parser(__doc__)
    made.add_argument("--hidden", type=int, help="default 576")
    made.add_argument("--blocks", type=int, help="default 8")
    made.add_argument("--peak", help=argparse.SUPPRESS)
    chosen = made.parse_args(argv)
    if chosen.peak:
        peak_here(**json.loads(chosen.peak))
        return
    sizes = {
        "hidden": chosen.hidden or (64 if chosen.quick else 576), "blocks": chosen.blocks or (2 if chosen.quick else 8),
        "batch": 2 if chosen.quick else 8, "length": 16 if chosen.quick else 128,
    }  # fmt: skip
    steps, repeats = (2, 1) if chosen.quick else (6, 3)
    repeats = chosen.repeats or repeats
    against_trainer(sizes, steps, repeats)
    lift(sizes, steps, repeats)
    resumed(sizes, steps)


if __name__ == "__main__":
    main()
