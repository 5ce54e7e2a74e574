"""Training-aware compression against compress-then-recover: equal bytes, equal training tokens, each at its best rate.

`maestro`, `pst` and `ofq` train while they make a model smaller; the others are made smaller first, without training,
and then repaired by as many steps on the same batches, all that is trainable in them. The sizes are those of `ofq` at
`--bits` and the shares of `--keep`. Rates of a grid are tried, from its middle as long as it gets better; the
held-out end of the training text chooses. Then `transect compare` judges all of them on text of its own, beside the
rows that were not repaired; differences are to the best repaired row of the size, paired sequence by sequence.

Everything is kept in `--out`, finished or not, and the same command goes on there, also with other sizes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import parser, show

import transect
from transect.checkpoint import open_model, save
from transect.errors import OutOfReach
from transect.evaluation import standard_error

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FREE = ("mixed", "kfac-svd")  # the best of all structures, and the best of low rank


@dataclass(frozen=True)
class Bench:
    """What every training has in common."""

    model: str
    data: str
    folder: Path
    steps: int
    batch_size: int
    sequences: int | None
    sequence_length: int | None
    grid: Sequence[float]

    def begin(self) -> None:
        """Note what all trainings of the folder have in common; SystemExit where it holds others'."""
        own = json.dumps([self.model, self.data, self.steps, self.batch_size, *self.text.values()])
        note = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if note.exists() and note.read_text(encoding="utf-8") != own:
            raise SystemExit(f"{self.folder} holds trainings with other settings: name another --out")
        note.write_text(own, encoding="utf-8")

    @property
    def text(self) -> dict[str, Any]:
        """How much of the text, in what pieces."""
        return {"sequences": self.sequences, "sequence_length": self.sequence_length}

    def common(self, rate: float) -> dict[str, Any]:
        """The arguments of one training; as many passes over the text as its steps take."""
        return {"steps": self.steps, "epochs": 1000, "batch_size": self.batch_size, "lr": rate, **self.text}

    def best(self, name: str, train: Callable[[float, Path], float]) -> tuple[Path, float]:
        """The folder and the rate of a contestant's best training; train(rate, folder) gives its held-out loss."""
        losses: dict[int, float] = {}

        def folder(index: int) -> Path:
            """Of the training at a rate of the grid."""
            return self.folder / f"{name}-{self.grid[index]:g}"

        def at(index: int) -> float:
            """Its held-out loss, trained unless it was; infinite beyond the ends of the grid."""
            if not 0 <= index < len(self.grid):
                return float("inf")
            if index not in losses:
                note = Path(f"{folder(index)}.json")
                if not note.exists():
                    note.write_text(json.dumps(train(self.grid[index], folder(index))), encoding="utf-8")
                losses[index] = json.loads(note.read_text(encoding="utf-8"))
                print(f"{name} at {self.grid[index]:g}: {losses[index]:.4f}", flush=True)
            return losses[index]

        now = len(self.grid) // 2
        for step in (-1, 1):
            while at(now + step) < at(now):
                now += step
        return folder(now), self.grid[now]

    def aware(self, method: str, settings: dict[str, Any], rate: float, folder: Path) -> float:
        """Train a dense model into a small one."""
        adapted = transect.adapt(
            self.model, method, self.data, out=folder, overwrite=True, settings={method: settings}, **self.common(rate)
        )
        return adapted.outcome["loss_after"]

    def repaired(self, small: Path, rate: float, folder: Path) -> float:
        """Train a model that was made small without training."""
        model = transect.recover(str(small), self.data, "full", out=folder, overwrite=True, **self.common(rate))
        return transect.Anatomy(model).record.history[-1]["loss_after"]

    def small(self, method: str, keep: float) -> Path | None:
        """The folder of a model that is made small without training; None where the method reaches no such size."""
        folder = self.folder / f"{method}-{keep:.4g}"
        if not folder.exists():
            opened = open_model(self.model)
            try:
                transect.compress(opened, method, keep, self.data, **self.text)
            except OutOfReach as reason:
                print(f"{method} has no row at {keep:.4g}: {reason}", flush=True)
                return None
            save(opened.model, folder, opened.tokenizer)
        return folder


def kept(dense: str, folder: Path) -> float:
    """The share of the dense model's bytes in its blocks' matrices that a checkpoint stores."""
    stored, whole = (transect.Anatomy(open_model(name).model).matrix_bytes() for name in (str(folder), dense))
    return stored / whole


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, judge, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--model", default="organism")
    options.add_argument("--data", default="organism:calibration")
    options.add_argument("--eval", default="organism:heldout", dest="heldout")
    options.add_argument("--eval-sequences", type=int, help="default 64")
    options.add_argument("--keep", default="0.5", help="shares of the bytes for all but ofq")
    options.add_argument("--bits", default="4,2", help="of ofq, whose sizes all others have, too")
    options.add_argument("--steps", type=int, help="default 100")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--sequence-length", type=int, help="default: the longest that the model reads")
    options.add_argument("--out", type=Path, help="default: a folder that is thrown away")
    given = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as thrown:
        out = given.out or Path(thrown) / "run"
        steps = given.steps or (2 if given.quick else 100)
        quick = given.quick
        free = FREE[1:] if quick else FREE
        length = given.sequence_length or (32 if quick else None)
        bench = Bench(
            given.model, given.data, out, steps, given.batch_size, 16 if quick else None, length,
            GRID[3:4] if quick else GRID,
        )  # fmt: skip
        bench.begin()
        bits_of_a_number = 8 * open_model(given.model).model.dtype.itemsize
        found: list[tuple[float, str, float, Path]] = []  # size, name, rate, folder
        sizes = {float(keep): None for keep in given.keep.split(",") if keep}
        for bits in (int(one) for one in given.bits.split(",") if one):
            folder, rate = bench.best(f"ofq-{bits}", partial(bench.aware, "ofq", {"bits": bits}))
            size = kept(given.model, folder)
            sizes[size] = None
            found.append((size, "ofq", rate, folder))
        for size in sizes:
            # What pst stores are the values that are not zero, and a bit for every entry.
            for name, settings in (("maestro", {"keep": size}), ("pst", {"sparsity": 1 - size + 1 / bits_of_a_number})):
                folder, rate = bench.best(f"{name}-{size:.4g}", partial(bench.aware, name, settings))
                found.append((size, name, rate, folder))
            for name in free:
                small = bench.small(name, size)
                if small is None:
                    continue
                folder, rate = bench.best(f"{name}-{size:.4g}-repaired", partial(bench.repaired, small))
                found.append((size, f"{name}, repaired", rate, folder))
        folders = {str(folder): (size, name, rate) for size, name, rate, folder in found}
        transect.compare(
            given.model,
            list(free),
            list(sizes),
            given.data,
            given.heldout,
            out / "compare",
            beside=list(folders),
            **bench.text,
            eval_sequences=given.eval_sequences or (4 if quick else 64),
        )
        rows = judged(out / "compare", folders)
    title = f"{given.model}: {steps} steps of {given.batch_size} sequences"
    show(title, list(rows[0]), [list(row.values()) for row in rows])
    return rows


def judged(folder: Path, folders: dict[str, tuple[float, str, float]]) -> list[dict[str, Any]]:
    """The table's rows by size, from those of the comparison; the best first."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "rows").glob("*.json"))]
    named = {Path(name).name: told for name, told in folders.items()}
    sizes = {size for size, _, _ in folders.values()}  # an earlier run may have left others
    of_size: dict[float, list[tuple[str, Any, dict[str, Any]]]] = {}
    for row in read:
        size, name, rate = named.get(row["method"].partition(" ")[0], (row["keep"], row["method"], "-"))
        if "examples" in row and row["method"] != "dense" and size in sizes:
            of_size.setdefault(size, []).append((name, rate, row))
    table = []
    for size, rows in sorted(of_size.items(), reverse=True):
        rows.sort(key=lambda one: one[2]["loss"])
        best = next(row for name, _, row in rows if name.endswith("repaired"))
        for name, rate, row in rows:
            pairs = [[tuple(pair) for pair in one["examples"]] for one in (row, best)]
            table.append(
                {"size": size, "row": name, "rate": rate, "kept": row["kept"], "loss": row["loss"]}
                | {"over the best repaired": row["loss"] - best["loss"], "±": standard_error(*pairs) or 0.0}
            )
    return table


if __name__ == "__main__":
    main()
