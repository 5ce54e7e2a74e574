"""Converted models beside compressed ones of the same cost, as they are and after the same repair.

- `experts`: `uoe` and `dense2moe`, of whose MLPs each position runs a part, beside `amp` and `modegpt` whose blocks
  take as many FLOPs for a token.
- `loops`: `relaxed-recursive` by loops and ranks, beside `llm-drop` and `fusegpt` in as many bytes (or one of them, by
  `--beside`: `fusegpt` trains for every block that it removes, which may take hours).

The repair is the same for all: so many steps on the same text towards the predictions of the model as it was, in all of
the blocks, at the rate of `--rates` that is best on the held-out end of that text. Loss is judged on text of its own;
the differences are to the dense model, paired sequence by sequence. Each row is kept in `--out`, and the same command
goes on there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import Kept, parser, show

import transect
from transect.checkpoint import open_model
from transect.compression import method as registered
from transect.data import load
from transect.errors import OutOfReach
from transect.evaluation import evaluate, model_bytes, operations_of, standard_error

EXPERTS, SHARED, ROUTED = 4, 0.25, 12  # of uoe; the shared part and the other experts of dense2moe


@dataclass(frozen=True)
class Bench:
    """What all rows have in common."""

    given: Any
    kept: Kept

    def open(self) -> Any:
        """The dense model, with its tokenizer."""
        return open_model(self.given.model)

    @property
    def data(self) -> dict[str, Any]:
        """The text that is looked at and trained on."""
        return {"sequences": self.given.sequences, "sequence_length": self.given.sequence_length}

    def converted(self, method: str, **settings: Any) -> Any:
        """The model in another architecture, not trained."""
        opened = self.open()
        return transect.convert(
            opened, method, self.given.data, settings={method: settings}, steps=0, **self.data
        ).model

    def compressed(self, method: str, keep: float) -> Any:
        """The model made smaller, not trained."""
        data = self.given.data if registered(method).collects else None
        return transect.compress(self.open(), method, keep, data, **self.data)

    def repaired(self, model: Any, rate: float) -> tuple[Any, float]:
        """The model after its training, and its loss on the held-out end of the training text."""
        dense, given = self.open(), self.given
        model = transect.recover(
            copy.deepcopy(model), given.data, "distill", teacher=dense.model, tokenizer=dense.tokenizer, train="full",
            steps=given.steps, epochs=1000, batch_size=given.batch_size, lr=rate, **self.data,
        )  # fmt: skip
        return model, transect.Anatomy(model).record.history[-1]["loss_after"]

    def row(self, name: str, make: Callable[[], Any]) -> dict[str, Any] | None:
        """A row as it is and repaired, from the folder if it is there; None where the method reaches no such size."""
        try:
            return self.kept.row(name, partial(self.as_it_is_and_repaired, name, make))
        except OutOfReach as reason:
            print(f"{name}: {reason}", flush=True)
            return None

    def as_it_is_and_repaired(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        """A row anew."""
        model = make()
        row, best = self.measured(model), float("inf")
        row["repaired"] = None
        for rate in self.given.rates if name != "dense" else ():
            trained, loss = self.repaired(model, rate)
            if loss < best:
                best, row["repaired"] = loss, {"rate": rate, **self.measured(trained)}
        after = [f"{one['loss']:.4f}" for one in [row["repaired"]] if one]
        print(f"{name}: {row['loss']:.4f}", *after, flush=True)
        return row

    def measured(self, model: Any) -> dict[str, Any]:
        """Loss, cost and speed."""
        held_out = load(
            self.given.heldout, model, self.open().tokenizer, sequence_length=self.given.sequence_length,
            sequences=self.given.eval_sequences,
        )  # fmt: skip
        found = evaluate(model, held_out)
        kept = {key: found[key] for key in ("loss", "examples", "bytes", "prefill_tokens_per_second")}
        return kept | {"flops": operations_of(model).flops}


def experts(bench: Bench) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Group, name and row of each model whose MLPs run a part, and of those that are compressed to its FLOPs."""
    matrices = transect.Anatomy(bench.open().model).matrices()
    of_mlps = sum(m.weight.numel() for m in matrices if m.role in ("gate", "up", "down"))
    part = of_mlps / sum(m.weight.numel() for m in matrices)
    for share in bench.given.active:
        active, chosen = round(EXPERTS * share), round(ROUTED * (share - SHARED) / (1 - SHARED))
        group, keep = f"{share:.0%} of the MLPs", 1 - (1 - share) * part
        uoe = {"experts": EXPERTS, "active": active}
        yield group, "uoe", bench.row(f"uoe {share:g}", partial(bench.converted, "uoe", **uoe))
        moe = {"experts": ROUTED, "active": chosen, "shared": SHARED}
        yield group, "dense2moe", bench.row(f"dense2moe {share:g}", partial(bench.converted, "dense2moe", **moe))
        if share < 1:
            yield from compressed(bench, group, ("amp", "modegpt"), keep)


def loops(bench: Bench) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Likewise, of each looped model and of those that are compressed to its bytes."""
    anatomy = transect.Anatomy(bench.open().model)
    dense, of_blocks = model_bytes(anatomy.model), anatomy.matrix_bytes()
    for count in bench.given.loops:
        for rank in bench.given.ranks:
            rows = {}
            for norms in bench.given.norms:
                make = partial(bench.converted, "relaxed-recursive", loops=count, rank=rank, norms=norms)
                rows[norms] = bench.row(f"relaxed-recursive {count} {rank} {norms}", make)
            keep = 1 - (dense - min(row["bytes"] for row in rows.values())) / of_blocks
            group = f"{count} loops, rank {rank} ({keep:.3f})"
            for norms, row in rows.items():
                yield group, f"relaxed-recursive, {norms} norms", row
            if keep < 1:
                yield from compressed(bench, group, bench.given.beside, keep)


def compressed(
    bench: Bench, group: str, methods: Sequence[str], keep: float
) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """The rows of compressed models."""
    for method in methods:
        yield group, method, bench.row(f"{method} {keep:.4f}", partial(bench.compressed, method, keep))


KINDS = {"experts": experts, "loops": loops}


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers with commas between them."""
    return [kind(one) for one in text.split(",") if one]


def main(argv: Sequence[str] | None = None) -> list[list[Any]]:
    """Make all models, judge them, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--model", default="organism")
    options.add_argument("--data", default="organism:calibration")
    options.add_argument("--eval", default="organism:heldout", dest="heldout")
    options.add_argument("--kinds", default="experts,loops")
    options.add_argument("--active", default="1,0.75,0.5,0.25", help="parts of the MLPs that run")
    options.add_argument("--loops", default="2", help="dividing the number of blocks")
    options.add_argument("--ranks", default="0,16,64", help="of the corrections")
    options.add_argument("--norms", default="own", help="of loops: own, shared (as in the paper) or both")
    options.add_argument("--beside", default="llm-drop,fusegpt", help="what loops are compared with, in as many bytes")
    options.add_argument("--steps", type=int, help="default 100")
    options.add_argument("--rates", default="1e-4,3e-4,1e-3")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--sequence-length", type=int, default=128)
    options.add_argument("--sequences", type=int, help="of the training text; default 256")
    options.add_argument("--eval-sequences", type=int, help="default 64")
    options.add_argument("--out", type=Path, help="folder that keeps each row; the same command goes on there")
    given = options.parse_args(argv)
    quick = given.quick
    given.steps = given.steps or (1 if quick else 100)
    given.sequences, given.eval_sequences = given.sequences or (16 if quick else 256), given.eval_sequences or (
        4 if quick else 64
    )  # fmt: skip
    given.active = numbers("0.5" if quick else given.active, float)
    given.loops, given.ranks = numbers(given.loops, int), numbers("4" if quick else given.ranks, int)
    given.beside, given.norms = numbers(given.beside, str), numbers(given.norms, str)
    given.rates = numbers("1e-4" if quick else given.rates, float)
    common = (
        "model",
        "data",
        "heldout",
        "steps",
        "rates",
        "batch_size",
        "sequence_length",
        "sequences",
        "eval_sequences",
    )
    bench = Bench(given, Kept(given.out, {name: getattr(given, name) for name in common}))
    dense = bench.row("dense", lambda: bench.open().model)
    assert dense is not None
    table = [["", "dense", 1.0, 1.0, 1.0, f"{dense['loss']:.4f}", "", ""]]
    for kind in given.kinds.split(","):
        for group, name, row in KINDS[kind](bench):
            if row is not None:
                table.append(line(group, name, row, dense))
    headings = ["same cost", "row", "bytes", "FLOPs", "time", "over dense", "repaired", "rate"]
    title = f"{given.model}: {given.steps} steps of {given.batch_size} sequences; bytes, FLOPs a token and "
    show(title + "time to read of the dense model's", headings, table)
    return table


def line(group: str, name: str, row: dict[str, Any], dense: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    repaired = row["repaired"]
    return [
        group, name, row["bytes"] / dense["bytes"], row["flops"] / dense["flops"],
        dense["prefill_tokens_per_second"] / row["prefill_tokens_per_second"], over(row, dense),
        "" if repaired is None else over(repaired, dense), "" if repaired is None else f"{repaired['rate']:g}",
    ]  # fmt: skip


def over(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """The loss over the dense model's and the standard error of that."""
    pairs = [[tuple(pair) for pair in one["examples"]] for one in (row, dense)]
    return f"{row['loss'] - dense['loss']:+.4f} ± {standard_error(*pairs) or 0.0:.4f}"


if __name__ == "__main__":
    main()
