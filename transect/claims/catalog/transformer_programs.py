"""Claims of transformer programs (Friedman et al., NeurIPS 2023, arXiv:2306.01128). The user's model plays no part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...studies import run_study, study_named
from ..context import Context
from ..registry import Result, Verdict, claim

NAME, PAPER = "transformer-programs", "arXiv:2306.01128"
SEEDS = 3  # that are tried, one after the other, until one is good enough
SOLVED, INDUCED, AGREE = 0.95, 0.99, 0.99
SETTINGS: dict[str, Any] = {"samples": 5000, "batch": 256, "epochs": 60}
LONGER = {"epochs": 120}  # for induction, which the released code trains twice as long
SHAPES: dict[str, dict[str, Any]] = {
    "hist": {"layers": 1, "heads": 2, "numerical_heads": 2, "mlps": 1, "numerical_mlps": 1},
    "reverse": {"layers": 2, "heads": 4, "numerical_heads": 0, "mlps": 2, "numerical_mlps": 0},
    "sort": {"layers": 2, "heads": 4, "numerical_heads": 2, "mlps": 1, "numerical_mlps": 1},
    "double_hist": {"layers": 2, "heads": 2, "numerical_heads": 2, "mlps": 1, "numerical_mlps": 1},
    "most_freq": {"layers": 2, "heads": 2, "numerical_heads": 2, "mlps": 1, "numerical_mlps": 1},
    "dyck-1": {"layers": 2, "heads": 2, "numerical_heads": 2, "mlps": 1, "numerical_mlps": 1},
    "dyck-2": {"layers": 2, "heads": 2, "numerical_heads": 2, "mlps": 1, "numerical_mlps": 1},
    "induction": {"layers": 2, "heads": 1, "numerical_heads": 0, "mlps": 0, "numerical_mlps": 0},
}
SHORT = 0.25  # of the epochs, where only the program is compared


@claim(
    f"{NAME}/solved", method=NAME, paper=PAPER,
    statement="Reversing, sorting and counting are learned by models that turn into programs: hardened, some seed "
    "labels 95 % of the words right.",
)  # fmt: skip
def solved(context: Context) -> Result:
    """5,000 sequences of at most eight words; accuracy on those that neither trained nor chose anything.

    At most three seeds, each with its own sequences, until one reaches it.
    """
    rows = [_tried(context, task, SOLVED) for task in ("reverse", "hist", "sort")]
    told = ", ".join(f"{row['task']} {row['hardened, tested']:.1%} (seed {row['seed']})" for row in rows)
    holds = all(row["hardened, tested"] >= SOLVED for row in rows)
    return Result(Verdict.of(holds), f"The best seeds: {told}", rows)


@claim(
    f"{NAME}/induction", method=NAME, paper=PAPER,
    statement="Two layers of one head each, and nothing else, learn to recall what stood behind the same letter "
    "before.",
)  # fmt: skip
def induction(context: Context) -> Result:
    """Ten words, sequences of ten; solved at 99 % of the labels, hardened; at most three seeds."""
    row = _tried(context, "induction", INDUCED)
    holds = row["hardened, tested"] >= INDUCED
    return Result(
        Verdict.of(holds),
        f"Seed {row['seed']} labels {row['hardened, tested']:.1%} right",
        [row],
    )


@claim(
    f"{NAME}/depth", method=NAME, paper=PAPER,
    statement="How many words are as frequent as a word takes two layers: one alone does it worse.",
)  # fmt: skip
def depth(context: Context) -> Result:
    """`double_hist` with the same heads and MLPs in a layer; of three seeds the best on validation sequences."""
    rows = [_run(context, "double_hist", 0, SEEDS, {"layers": layers}) for layers in (1, 2)]
    one, two = (row["hardened, tested"] for row in rows)
    return Result(
        Verdict.of(one < two),
        f"Of the words {one:.1%} are labelled right by one layer, {two:.1%} by two",
        rows,
    )


@claim(
    f"{NAME}/hardening", method=NAME, paper=PAPER,
    statement="Trained to the lowest temperature, a model that samples its choices and the hardened one give the same "
    "label for 99 % of the words.",
)  # fmt: skip
def hardening(context: Context) -> Result:
    """The best seeds of the tasks of `solved` and `induction`, on validation sequences."""
    rows = [_tried(context, task, SOLVED) for task in ("reverse", "hist", "sort")]
    rows.append(_tried(context, "induction", INDUCED))
    holds = all(row["hardened as sampled"] >= AGREE for row in rows)
    told = ", ".join(f"{row['task']} {row['hardened as sampled']:.1%}" for row in rows)
    return Result(Verdict.of(holds), f"The same label: {told}", rows)


@claim(
    f"{NAME}/exact", method=NAME, paper=PAPER,
    statement="On every task of the paper the Python program gives the label of the model that it is made from, at "
    "every word.",
)  # fmt: skip
def exact(context: Context) -> Result:
    """A model a task, trained a quarter as long as for the other claims, which show the same of theirs.

    Compared on validation and test sequences, at all words, also where nothing is asked.
    """
    short = {"epochs": max(1, round(SHORT * SETTINGS["epochs"]))}
    rows = [_run(context, task, 0, 1, short) for task in SHAPES]
    least = min(min(row["program as hardened"], row["program, tested"]) for row in rows)
    return Result(
        Verdict.of(least == 1),
        f"Of {len(rows)} tasks the program that differs most gives {least:.2%} of the words the model's label",
        rows,
    )


def _tried(context: Context, task: str, enough: float) -> dict[str, Any]:
    """The first seed that labels so much of the validation sequences right, or the best of all on these."""
    rows = []
    for seed in range(SEEDS):
        rows.append(_run(context, task, seed, 1, LONGER if task == "induction" else {}))
        if rows[-1]["hardened"] >= enough:
            break
    return max(rows, key=lambda row: row["hardened"])


def _run(context: Context, task: str, seed: int, seeds: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of the best of so many seeds, by their names; trained once."""
    settings = {"task": task, "seeds": seeds, **SETTINGS, **SHAPES[task], **more}
    key = f"{NAME} {sorted(settings.items())} {seed}"
    if key not in context.shared:
        device = str(context.model.device)
        found = run_study(study_named(NAME), settings, seed=seed, device=device, progress=context.progress)
        best = int(found["measures"][:, 1].nan_to_num(-1).argmax())
        named = zip(found.labels["measure"], found["measures"][best].tolist(), strict=True)
        context.shared[key] = {"task": task, "layers": settings["layers"], "seed": seed + best, **dict(named)}
    return context.shared[key]
