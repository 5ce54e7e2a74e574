"""Claims about facts of the bundled model that questions reach (after Xu and Chen, 2025, arXiv:2508.00901)."""

from __future__ import annotations

from typing import Any

from ...probes import Result as Found
from ...studies import run_study, study_named
from ..context import Context
from ..registry import Result, Verdict, claim

METHOD, PAPER = "organism-questions", "arXiv:2508.00901"
SETTINGS: dict[str, Any] = {"fine_tuned": "2,32", "rank": "0,1", "seeds": 3}


def found(context: Context) -> Found:
    """What the study finds, once for all claims of a run: of the bundled model, whatever model is at hand."""
    if METHOD not in context.shared:
        context.shared[METHOD] = run_study(study_named(METHOD), SETTINGS, progress=context.progress)
    return context.shared[METHOD]


def told(result: Found) -> tuple[str, list[dict[str, Any]]]:
    """What is reached, in words, and a row for each way of fine-tuning and number of subjects."""
    count = result["after"].shape[-1]
    rows = [
        {
            "fine-tuned": rank, "subjects": int(tuned), "before": float(result["before"][t].mean()),
            "reached": float(result["after"][r, t].mean()),
            "±": float(result["after"][r, t].std() / count**0.5) if count > 1 else float("nan"),
            "stored, not reached": float(result["unreachable"][r, t].mean()),
        }
        for r, rank in enumerate(result.labels["rank"])
        for t, tuned in enumerate(result.labels["tuned"])
    ]  # fmt: skip
    by = (f"{row['reached']:.3f} with {row['fine-tuned']} and {row['subjects']} subjects" for row in rows)
    return f"Reached {', '.join(by)}; before {rows[0]['before']:.3f}", rows


@claim(
    "organism-questions/more-subjects",
    method=METHOD,
    paper=PAPER,
    statement="The more subjects a model is fine-tuned on questions about, the more facts of other subjects the "
    "questions reach.",
)
def more_subjects(context: Context) -> Result:
    """2 and 32 of the bundled model's 200 subjects, three draws; with all parameters and with rank 1."""
    result = found(context)
    after = result["after"].mean(-1)
    holds = (after[:, -1] > after[:, 0]).all()
    return Result(Verdict.of(holds), *told(result))


@claim(
    "organism-questions/low-rank",
    method=METHOD,
    paper=PAPER,
    statement="Fine-tuning with rank 1 reaches at least as many facts as fine-tuning all parameters.",
)
def low_rank(context: Context) -> Result:
    """LoRA on every linear layer of the blocks; means over 2 and 32 subjects and three draws."""
    result = found(context)
    full, low = result["after"].mean((1, 2))
    return Result(Verdict.of(low >= full), *told(result))
