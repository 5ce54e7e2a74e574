"""Claims about facts that questions reach, in one layer (Xu and Chen, 2025, arXiv:2508.00901)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ...probes import Result as Found
from ...studies import run_study, study_named
from ..context import Context
from ..registry import Result, Verdict, claim

METHOD, PAPER = "one-layer-knowledge", "arXiv:2508.00901"
SETTINGS: dict[str, Any] = {"fine_tuned": "2,8,32", "rank": "0,1", "seeds": 3}  # the study's own sizes otherwise
JUDGED = ("8", "32")  # fine-tuned subjects, of 100, over which means are taken
FEW, SOME, MANY = 1, 2, 4  # multiplicities, of the study's 8 templates
TEMPLATES = 32  # in place of 8
STORED, LOST = 0.95, 0.4  # told right behind its own template above this, and for a question at most this
FULL, LOW = 0.6, 0.9  # reached above this with all parameters, and with rank 1
LOSS, ENERGY = 0.01, 0.9


def found(context: Context, **settings: Any) -> Found:
    """What the study finds with these settings, once for all claims of a run. The model at hand plays no part."""
    key = f"{METHOD} {sorted(settings.items())}"
    if key not in context.shared:
        study = study_named(METHOD)
        context.shared[key] = run_study(study, {**SETTINGS, **settings}, progress=context.progress)
    return context.shared[key]


def usual(context: Context) -> Found:
    """The multiplicities that all claims share."""
    return found(context, multiplicity=f"{FEW},{SOME},{MANY}")


def rows_of(result: Found, **more: Any) -> list[dict[str, Any]]:
    """A row for each way of fine-tuning, number of fine-tuned subjects and multiplicity; means over seeds, and ±."""
    after, count = result["after"][0], result["after"].shape[-1]
    return [
        {
            **more, "fine-tuned": rank, "subjects": int(tuned), "multiplicity": int(one),
            "coverage": float(result["coverage"][t, k].mean()), "before": float(result["before"][0, t, k].mean()),
            "reached": float(after[r, t, k].mean()),
            "±": float(after[r, t, k].std() / count**0.5) if count > 1 else float("nan"),
            "stored, not reached": float(result["unreachable"][r, t, k].mean()),
        }
        for r, rank in enumerate(result.labels["rank"])
        for t, tuned in enumerate(result.labels["tuned"])
        for k, one in enumerate(result.labels["multiplicity"])
    ]  # fmt: skip


def reach(result: Found, multiplicity: int) -> tuple[float, float]:
    """Means over JUDGED and seeds, with all parameters and with rank 1."""
    chosen = [i for i, tuned in enumerate(result.labels["tuned"]) if tuned in JUDGED]
    k = list(result.labels["multiplicity"]).index(str(multiplicity))
    after = result["after"][0][:, chosen, k].mean((1, 2))
    return float(after[0]), float(after[1])


@claim(
    "one-layer-knowledge/unreachable",
    method=METHOD,
    paper=PAPER,
    statement="A fact that was told in one template alone is stored (behind that template it is told right in more "
    "than 0.95 of the cases, at a loss below 0.01), and yet no question reaches it after fine-tuning on questions "
    "about other subjects (right in 0.4 at most).",
)
def unreachable(context: Context) -> Result:
    """Means over 8 and 32 fine-tuned subjects of 100 and three seeds, with all parameters and with rank 1."""
    result = usual(context)
    k = list(result.labels["multiplicity"]).index(str(FEW))
    loss, stored, reached = (
        float(result["pretraining_loss"][k].mean()), float(result["stored"][0, k].mean()), reach(result, FEW)
    )  # fmt: skip
    return Result(
        Verdict.of(loss < LOSS and stored > STORED and max(reached) <= LOST),
        f"Told in {FEW} of 8 templates: right behind its own in {stored:.3f}, loss {loss:.4f}; for a question in "
        f"{reached[0]:.2f} with all parameters and {reached[1]:.2f} with rank 1",
        [row for row in rows_of(result) if row["multiplicity"] == FEW],
    )


@claim(
    "one-layer-knowledge/multiplicity",
    method=METHOD,
    paper=PAPER,
    statement="The more templates a fact was told in, the more often a question reaches it: more in two than in one, "
    "more in four than in two, and then in more than 0.6 with all parameters and more than 0.9 with rank 1.",
)
def multiplicity(context: Context) -> Result:
    """As `unreachable`, for 1, 2 and 4 of 8 templates; both ways of fine-tuning must agree."""
    result = usual(context)
    reached = [reach(result, count) for count in (FEW, SOME, MANY)]
    grows = all(low < high for way in zip(*reached, strict=True) for low, high in pairwise(way))
    full, low = ", ".join(f"{one[0]:.2f}" for one in reached), ", ".join(f"{one[1]:.2f}" for one in reached)
    return Result(
        Verdict.of(grows and reached[-1][0] > FULL and reached[-1][1] > LOW),
        f"Reached at multiplicity {FEW}, {SOME}, {MANY}: {full} with all parameters; {low} with rank 1",
        rows_of(result),
    )


@claim(
    "one-layer-knowledge/more-templates",
    method=METHOD,
    paper=PAPER,
    statement="With four times as many templates in all (32 for 8), and as many told (4), a question reaches fewer "
    "facts.",
)
def more_templates(context: Context) -> Result:
    """Judged with rank 1, which leaves fewest to overfitting; all parameters are reported."""
    results = {8: usual(context), TEMPLATES: found(context, multiplicity=str(MANY), templates=TEMPLATES)}
    few, many = (reach(result, MANY) for result in results.values())
    return Result(
        Verdict.of(many[1] < few[1]),
        f"With 8 and {TEMPLATES} templates: {few[1]:.2f} and {many[1]:.2f} with rank 1; {few[0]:.2f} and {many[0]:.2f} "
        "with all parameters",
        [
            row
            for count, result in results.items()
            for row in rows_of(result, templates=count)
            if row["multiplicity"] == MANY
        ],
    )


@claim(
    "one-layer-knowledge/low-rank",
    method=METHOD,
    paper=PAPER,
    statement="Fine-tuning with rank 1 reaches at least as many facts as fine-tuning all parameters.",
)
def low_rank(context: Context) -> Result:
    """Facts told in 4 of 8 templates; rank 1 on Q, K, V and the MLP's first matrix, 100 steps for 150."""
    result = usual(context)
    full, low = reach(result, MANY)
    return Result(
        Verdict.of(low >= full),
        f"Told in {MANY} of 8 templates: {low:.2f} with rank 1, {full:.2f} with all parameters",
        [row for row in rows_of(result) if row["multiplicity"] == MANY],
    )


@claim(
    "one-layer-knowledge/one-direction",
    method=METHOD,
    paper=PAPER,
    statement="The first fine-tuning step is nearly one direction: where facts were told in four of eight templates, "
    "the top singular direction of the gradient has 0.9 or more of its energy, of V and of the MLP's first matrix.",
)
def one_direction(context: Context) -> Result:
    """||G||₂² / ||G||_F² at the pretrained weights; how far its input side lies among the question tokens, reported."""
    result = usual(context)
    table = [
        {
            "matrix": name, "multiplicity": int(one), "share": float(result["gradient_share"][m, :, k].mean()),
            "within the questions": float(result["gradient_input"][m, :, k].mean()),
            "within their change": float(result["gradient_change"][m, :, k].mean()),
        }
        for m, name in enumerate(result.labels["matrix"])
        for k, one in enumerate(result.labels["multiplicity"])
    ]  # fmt: skip
    asked = {row["matrix"]: row["share"] for row in table if row["multiplicity"] == MANY}
    return Result(
        Verdict.of(min(asked["v"], asked["up"]) >= ENERGY),
        f"At multiplicity {MANY}: {', '.join(f'{name} {share:.2f}' for name, share in asked.items())}",
        table,
    )


@claim(
    "one-layer-knowledge/without-mlp",
    method=METHOD,
    paper=PAPER,
    statement="Without an MLP, fewer facts are reached by a question after fine-tuning with rank 1.",
)
def without_mlp(context: Context) -> Result:
    """Pretrained and fine-tuned without one, facts told in 4 of 8 templates. The paper goes further: that attention
    alone may fail to store facts; what it stores is in the numbers."""
    results = {"whole": usual(context), "no-mlp": found(context, multiplicity=str(MANY), layer="no-mlp")}
    whole, alone = (reach(result, MANY) for result in results.values())
    stored = float(results["no-mlp"]["stored"][0].mean())
    return Result(
        Verdict.of(alone[1] < whole[1]),
        f"With rank 1: {alone[1]:.2f} without an MLP, {whole[1]:.2f} with one; all parameters: {alone[0]:.2f} and "
        f"{whole[0]:.2f}. Without one, {stored:.3f} are told right behind their own templates before fine-tuning",
        [row for name, result in results.items() for row in rows_of(result, layer=name) if row["multiplicity"] == MANY],
    )


@claim(
    "one-layer-knowledge/coverage",
    method=METHOD,
    paper=PAPER,
    statement="Questions reach more facts where the fine-tuned subjects cover more of the templates.",
)
def coverage(context: Context) -> Result:
    """From 2 to 32 fine-tuned subjects, mean over multiplicities 1, 2 and 4.

    With both ways of fine-tuning the rise must be more than twice its standard error over seeds, in pairs.
    """
    result = usual(context)
    after, covered = result["after"][0].mean(2), result["coverage"].mean((1, 2))  # (rank, tuned, seed), (tuned)
    rise = after[:, -1] - after[:, 0]
    count = rise.shape[-1]
    error = rise.std(-1) / count**0.5 if count > 1 else torch.zeros(len(rise))
    told = "; ".join(
        f"{name}: {float(after[r, 0].mean()):.3f} and {float(after[r, -1].mean()):.3f}, a rise of "
        f"{float(rise[r].mean()):.3f} ± {float(error[r]):.3f}"
        for r, name in enumerate(result.labels["rank"])
    )
    return Result(
        Verdict.of((rise.mean(-1) > 2 * error).all()),
        f"Coverage {float(covered[0]):.2f} and {float(covered[-1]):.2f}. Reached with {told}",
        rows_of(result),
    )
