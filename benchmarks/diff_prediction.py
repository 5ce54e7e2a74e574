"""How well `diff` predicts which blocks' changes cost most: a row for each way to compress or edit a model.

The model is changed, and each block's part in the change is predicted to second order from the model as it was, and
measured by taking that block alone from the changed one. Rank correlations over the blocks are Spearman's: with the
divergence, which is what is predicted, and with the loss on the text, which a change moves by its first order, too.
Methods that make blocks of other shapes have no row, since their change has no difference to predict from, and edits
that change fewer than three blocks none either. The facts that are rewritten are the first that have a new answer.

Target: a rank correlation with the divergence of 0.9.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import parser, show, verdict

import transect
from transect.checkpoint import Opened, open_model
from transect.compression import method
from transect.data import load_facts
from transect.errors import TransectError

FEW = {  # shares of float32 for 4 and 3 bits
    "rtn": "0.15,0.11", "gptq": "0.15,0.11", "mixed": "0.15,0.1", "lqer": "0.2", "eora": "0.2", "caldera": "0.2",
    "jlcm": "0.2",
}  # fmt: skip
METHODS = (
    "svd", "fwsvd", "asvd", "svd-llm", "kfac-svd", "magnitude", "wanda", "sparsegpt", "nowag-p", "armor", "rtn", "gptq",
    "lqer", "eora", "caldera", "jlcm", "mixed", "monarch", "dsformer", "cospadi", "cospadi-shared",
)  # fmt: skip
EDITS = {"memit": {}, "kfac-edit": {"layers": "all"}}  # those that change several blocks


def compressed(given: argparse.Namespace, opened: Opened, name: str, keep: float) -> Any:
    """The model by a method at that share of its bytes."""
    data = given.data if method(name).collects else None
    length = given.sequence_length
    return transect.compress(opened, name, keep, data, sequences=given.sequences, sequence_length=length)


def edited(given: argparse.Namespace, opened: Opened, name: str) -> Any:
    """The model by an edit, of its facts or of what it knows by heart."""
    facts = None
    if name == "memit":
        facts = [fact for fact in load_facts(given.facts) if fact.new_answer][: given.edited]
    return transect.edit(
        opened, name, facts=facts, data=given.data, sequences=given.sequences,
        sequence_length=given.sequence_length, settings={name: EDITS[name]},
    ).model  # fmt: skip


def row(given: argparse.Namespace, name: str, keep: float | None) -> list[str | float] | str:
    """A row of the table, or why there is none. keep: None for an edit."""
    opened = open_model(given.model, dtype="float32")
    try:
        other = edited(given, opened, name) if keep is None else compressed(given, opened, name, keep)
        difference = transect.diff(
            open_model(given.model, dtype="float32"), other, given.heldout, what=["loss"], tokenizer=opened.tokenizer,
            sequences=given.eval_sequences, sequence_length=given.sequence_length,
        )  # fmt: skip
    except TransectError as reason:
        return str(reason)
    if "loss" in difference.refused:
        return difference.refused["loss"]
    found = difference["loss"]
    values = [found[key] for key in ("predicted", "measured", "divergence")]
    if "correlation" not in found.quantities or not torch.stack(values).isfinite().all():
        return "not every block's change can be told, or fewer than three are changed"
    correlations = [float(found["correlation of divergence"]), float(found["correlation"])]
    share = "-" if keep is None else keep
    return [name, share, *(float(value.sum()) for value in values), *correlations, verdict(correlations[0] >= 0.9)]


def main(argv: Sequence[str] | None = None) -> list[list[str | float]]:
    """Change the model, predict, measure, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--model", default="organism")
    options.add_argument("--data", default="organism:calibration")
    options.add_argument("--heldout", default="organism:heldout", help="text on which the cost is predicted and seen")
    options.add_argument("--sequences", type=int, help="of the calibration text; default 64")
    options.add_argument("--sequence-length", type=int, default=128)
    options.add_argument("--eval-sequences", type=int, help="default 32")
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--keep", help="for all methods; default 0.9 and 0.7, or 4 and 3 bits")
    options.add_argument("--edits", default=",".join(EDITS))
    options.add_argument("--facts", default="organism:facts", help="those to rewrite; of most models `common`")
    options.add_argument("--edited", type=int, default=10, help="how many facts are rewritten together")
    given = options.parse_args(argv)
    given.sequences = given.sequences or (4 if given.quick else 64)
    given.eval_sequences = given.eval_sequences or (4 if given.quick else 32)
    wanted: list[tuple[str, float | None]] = [
        (name, float(keep))
        for name in filter(None, given.methods.split(","))
        for keep in (given.keep or FEW.get(name, "0.9,0.7")).split(",")
    ]
    wanted += [(name, None) for name in filter(None, given.edits.split(","))]
    rows = []
    for name, keep in wanted:
        found = row(given, name, keep)
        what = name if keep is None else f"{name} at {keep:g}"
        if isinstance(found, str):
            print(f"{what}: {found}", flush=True)
        else:
            print(f"{what}: {found[5]:.2f}", flush=True)
            rows.append(found)
    show(
        f"{given.model}: what the blocks' changes cost alone, in nats, summed; rank correlations over blocks",
        ["method", "keep", "predicted", "measured", "divergence", "with divergence", "with loss", ">= 0.9"], rows,
    )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
