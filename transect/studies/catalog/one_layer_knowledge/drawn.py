"""The plots of the study, from its arrays and labels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ....probes import Drawing, Result, Table
from ....probes.draw import bars, lines, scatter
from .told import names

REACH = "share of held-out facts"


def draw(result: Result) -> list[Drawing]:
    """What questions reach, against multiplicity, fine-tuned subjects, coverage and steps; and the gradient."""
    return [*by_multiplicity(result), *by_tuned(result), coverage(result), kinds(result), trend(result),
            *courses(result), *gradients(result), everything(result)]  # fmt: skip


def by_multiplicity(found: Result) -> list[Drawing]:
    """Reach against K, a plot a way of fine-tuning."""
    counts, tuned = [int(one) for one in names(found, "multiplicity")], names(found, "tuned")
    still = {"stored (own template)": found["stored"][0].mean(-1), "before": found["before"][0].mean((0, -1))}
    return [
        lines(
            f"Reached by a question, by multiplicity ({name})",
            "A fact was told in so many templates in pretraining. Each line: so many subjects were fine-tuned on "
            "questions, and the others are asked about. Far below what is stored: stored and not reachable.",
            still | {f"{one} subjects": found["after"][0, rank, i].mean(-1) for i, one in enumerate(tuned)},
            x=counts, xlabel="templates a fact is told in", ylabel=REACH,
        )
        for rank, name in enumerate(names(found, "rank"))
    ]  # fmt: skip


def by_tuned(found: Result) -> list[Drawing]:
    """Reach against N_f, a plot a way of fine-tuning."""
    return [
        lines(
            f"Reached by a question, by fine-tuned subjects ({name})",
            "Each line: a multiplicity. The budget of steps is fixed, so many subjects also mean more fitting.",
            {
                f"multiplicity {one}": found["after"][0, rank, :, k].mean(-1)
                for k, one in enumerate(names(found, "multiplicity"))
            },
            x=names(found, "tuned"), xlabel="fine-tuned subjects", ylabel=REACH,
        )
        for rank, name in enumerate(names(found, "rank"))
    ]  # fmt: skip


def coverage(found: Result) -> Drawing:
    """Reach against coverage, a point a cell and seed."""
    after, covered = found["after"][0], found["coverage"]
    groups: dict[str, tuple[Tensor, Tensor]] = {}
    for rank, name in enumerate(names(found, "rank")):
        for k, one in enumerate(names(found, "multiplicity")):
            groups[f"{name}, multiplicity {one}"] = covered[:, k].flatten(), after[rank, :, k].flatten()
    return scatter(
        "Reached by a question, by coverage",
        "Coverage: the share of an attribute's templates in which some fine-tuned subject was told of. The paper's "
        "rule is that relations, not facts, must be revisited.",
        groups, xlabel="coverage", ylabel=REACH,
    )  # fmt: skip


def kinds(found: Result) -> Drawing:
    """What questions get for an answer."""
    shares = found["after"].mean((2, -1))  # (kind, rank, K)
    x = [
        f"{name.removesuffix(' parameters')}, K = {one}"
        for name in names(found, "rank")
        for one in names(found, "multiplicity")
    ]
    return bars(
        "What a question gets for an answer",
        "By way of fine-tuning and multiplicity, mean over numbers of fine-tuned subjects.",
        {kind: shares[i].flatten() for i, kind in enumerate(names(found, "answer"))},
        x=x, xlabel="fine-tuned", ylabel=REACH,
    )  # fmt: skip


def trend(found: Result) -> Drawing:
    """Errors beside the form of the paper's bound."""
    x = -found["bound"].log()  # (tuned, K)
    groups: dict[str, tuple[Tensor, Tensor]] = {
        name: (x.flatten(), 1 - found["after"][0, rank].mean(-1).flatten())
        for rank, name in enumerate(names(found, "rank"))
    }
    line = torch.linspace(0, min(5.0, float(x.max())), 40)
    return scatter(
        "Errors, and the form of the paper's bound",
        "Trend line only: exp(-x) with x = N_f K² ln|R| / (2|R|²). Its assumptions (nearly orthogonal embeddings, "
        "sizes) are not those of these models and its constants are unknown, so points above it refute nothing.",
        groups | {"exp(-x), a trend line": (line, (-line).exp())}, xlabel="N_f K² ln|R| / (2|R|²)",
        ylabel="share answered wrong",
    )  # fmt: skip


def courses(found: Result) -> list[Drawing]:
    """Reach as the fine-tuning goes."""
    course = found["course"].mean((1, -1))  # (rank, point, K)
    return [
        lines(
            f"As the fine-tuning goes ({name})",
            "Mean over numbers of fine-tuned subjects. Where a line falls, the budget is too long for so few facts.",
            {f"multiplicity {one}": course[rank, :, k] for k, one in enumerate(names(found, "multiplicity"))},
            x=names(found, "point"), xlabel="part of the steps", ylabel=REACH,
        )
        for rank, name in enumerate(names(found, "rank"))
    ]  # fmt: skip


def gradients(found: Result) -> list[Drawing]:
    """The first fine-tuning step."""
    multiplicity, matrices = [f"K = {one}" for one in names(found, "multiplicity")], names(found, "matrix")
    share, inputs = found["gradient_share"].mean((1, -1)), found["gradient_input"].mean((1, -1))
    return [
        bars(
            "The first fine-tuning step is nearly one direction",
            "Share of a gradient's energy in its top singular direction: near 1, low-rank fine-tuning loses nothing.",
            {name: share[i] for i, name in enumerate(matrices)}, x=multiplicity, xlabel="", ylabel="share of energy",
        ),
        bars(
            "What that direction reads",
            "How much of its input side lies in the span of the question tokens' embeddings. 1 for Q by its form.",
            {name: inputs[i] for i, name in enumerate(matrices)}, x=multiplicity, xlabel="",
            ylabel="length within the span",
        ),
    ]  # fmt: skip


def everything(found: Result) -> Drawing:
    """Every cell in numbers."""
    count = found["coverage"].shape[-1]
    rows = []
    for rank, name in enumerate(names(found, "rank")):
        for t, tuned in enumerate(names(found, "tuned")):
            for k, one in enumerate(names(found, "multiplicity")):
                after = found["after"][0, rank, t, k]
                error = float(after.std()) / count**0.5 if count > 1 else float("nan")
                others = (found["unreachable"], found["kept"], found["learned"])
                values = [float(after.mean()), error, *(float(each[rank, t, k].mean()) for each in others)]
                before, covered = float(found["before"][0, t, k].mean()), float(found["coverage"][t, k].mean())
                rows.append([name, tuned, one, *(f"{value:.3f}" for value in (covered, before, *values))])
    return Table(
        "Every cell",
        f"Means over {count} seed{'s' if count > 1 else ''}, ± the standard error. Lost: stored and not reached. Kept: "
        "still right behind own templates. Trained: fine-tuned questions right.",
        ["fine-tuned", "subjects", "multiplicity", "coverage", "before", "reached", "±", "lost", "kept", "trained"],
        rows,
    )  # fmt: skip
