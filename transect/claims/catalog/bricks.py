"""Claims of configurable foundation models about neurons (Xiao et al. 2024, arXiv:2409.02877).

Kinds of input are those of the bundled model's world for that model, and documentation, code, sums and names of
characters for others. Neurons are chosen on one half of the labelled texts, and what they are for is measured on the
other.
"""

from __future__ import annotations

import torch

from ...probes import Result as Found
from ...probes.catalog.bricks.sparsity import MASKED, below
from ..context import Context
from ..probing import probed, probed_once, untrained
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2409.02877"
METHOD = "bricks"
SETTINGS: dict[str, int] = {}
ALMOST_NOTHING = 0.05  # nats (ours)
NEAR = 0.02  # of the mean score from the base rate


@claim(
    "bricks/specialised",
    method=METHOD,
    paper=PAPER,
    statement="Without the 5 % of the neurons that serve a kind of input best, the perplexity rises more on this kind "
    "than on others, on average over kinds; in a model with random weights it does not.",
)
def specialised(context: Context) -> Result:
    """By the means on and off the diagonal of the matrix of relative rises.

    "It does not" is read as: by less than a hundredth of what it does in the trained model (ours), since no difference
    of random numbers is zero.
    """
    found, fresh = _found(context), probed(untrained(context.specimen), METHOD, functions=_kinds(context), **SETTINGS)
    rows, gaps = [], []
    for model, one in (("trained", found), ("random weights", fresh)):
        rise, names = one["rise"], one.labels["function"]
        off = ~torch.eye(len(names), dtype=torch.bool)
        others = rise[off].view(len(names), -1).mean(1)
        gaps.append(float(rise.diagonal().mean() - others.mean()))
        rows += [
            {
                "model": model, "kind": name, "own": float(rise[c, c]), "others": float(others[c]),
                "random neurons": float(one["random rise"][c]),
            }
            for c, name in enumerate(names)
        ]  # fmt: skip
    own, other = (sum(row[key] for row in rows[: len(rows) // 2]) * 2 / len(rows) for key in ("own", "others"))
    return Result(
        Verdict.of(gaps[0] > 0 and gaps[1] < gaps[0] / 100),
        f"The perplexity rises by {own:.0%} on the own kind and by {other:.0%} on others (means over {len(rows) // 2} "
        f"kinds), without as many random neurons by {float(found['random rise'].mean()):.1%}. In the model with random "
        f"weights own and others differ by {gaps[1]:.2%}.",
        rows,
    )


@claim(
    "bricks/scores",
    method=METHOD,
    paper=PAPER,
    statement="For every kind of input some neuron's activation tells it from the others (average precision above "
    "0.8), far above shuffled labels, while the mean over neurons is within 0.02 of no information.",
)
def scores(context: Context) -> Result:
    """The paper has best scores above 0.8 for three of its seven kinds; that the mean is near chance is our card's."""
    found = _found(context)
    rows = [
        {
            "kind": name, "base rate": float(found["base"][c]), "best": float(found["best"][c].max()),
            "best with shuffled labels": float(found["best by chance"][c].max()),
            "mean": float(found["mean"][c].mean()),
        }
        for c, name in enumerate(found.labels["function"])
    ]  # fmt: skip
    told = all(row["best"] > 0.8 and row["best"] > 1.5 * row["best with shuffled labels"] for row in rows)
    away = max(abs(row["mean"] - row["base rate"]) for row in rows)
    worst = min(rows, key=lambda row: row["best"])
    return Result(
        Verdict.of(told and away <= NEAR),
        f"The lowest best score is that of {worst['kind']}: {worst['best']:.2f}, with shuffled labels "
        f"{worst['best with shuffled labels']:.2f}. The mean over neurons is at most {away:.3f} from the base rate.",
        rows,
    )


@claim(
    "bricks/few-neurons",
    method=METHOD,
    paper=PAPER,
    statement="For a token 80 % of the neurons have an activation below a fifth of the largest, and with 70 % at zero "
    "by activation, or 80 % by the size of their output, the loss hardly changes.",
)
def few_neurons(context: Context) -> Result:
    """Hardly: by less than 0.05 nats (ours). On the first sequences of the calibration text."""
    found = _found(context)
    share = float(below(found["distribution"], 0.2)[0].mean())
    losses = found["masked loss"]
    by_activation = float(losses[0, MASKED.index(0.7)] - losses[0, 0])
    by_output = float(losses[1, MASKED.index(0.8)] - losses[1, 0])
    return Result(
        Verdict.of(share >= 0.8 and max(by_activation, by_output) < ALMOST_NOTHING),
        f"{share:.0%} of the neurons are below a fifth of the largest. The loss of {float(losses[0, 0]):.3f} changes "
        f"by {by_activation:+.3f} nats with 70 % at zero by activation, by {by_output:+.3f} with 80 % by output.",
        _losses(found),
    )


@claim(
    "bricks/output-size",
    method=METHOD,
    paper=PAPER,
    statement="With the same share of neurons at zero, choosing them by the size of their output costs no more than by "
    "their activation, and both far less than at random.",
)
def output_size(context: Context) -> Result:
    """At every share between 10 % and 90 %; far less: at most half. On the first sequences of the calibration text."""
    found = _found(context)
    rows = _losses(found)[1:-1]
    whole = float(found["masked loss"][0, 0])
    worse = [row["at zero"] for row in rows if row["by output"] > row["by activation"]]
    near = [
        row["at zero"] for row in rows
        if 2 * (max(row["by output"], row["by activation"]) - whole) > row["at random"] - whole
    ]  # fmt: skip
    last = rows[-1]
    return Result(
        Verdict.DOES_NOT_HOLD if worse or near else Verdict.HOLDS,
        f"From {whole:.4f} nats to {last['by output']:.4f} by output, {last['by activation']:.4f} by activation and "
        f"{last['at random']:.4f} at random, with 90 % at zero. By output it costs more at "
        f"{', '.join(f'{share:.0%}' for share in worse) or 'no share'}.",
        _losses(found),
    )


@claim(
    "bricks/separate",
    method=METHOD,
    paper=PAPER,
    statement="The 5 % of the neurons that serve one kind of input are others than those of another kind: sets share "
    "fewer neurons than random ones do.",
)
def separate(context: Context) -> Result:
    """On average over pairs of kinds; the paper's are at 0 to 4 % for most pairs, and 8 to 9 % for one."""
    found = _found(context)
    overlap, names, chance = found["overlap"], found.labels["function"], float(found["share"])
    rows = [
        {"kind": names[a], "other": names[b], "overlap": float(overlap[a, b])}
        for a in range(len(names)) for b in range(a)
    ]  # fmt: skip
    mean = sum(row["overlap"] for row in rows) / len(rows)
    most = max(rows, key=lambda row: row["overlap"])
    return Result(
        Verdict.of(mean < chance),
        f"Two kinds share {mean:.1%} of their neurons on average; random sets {chance:.1%}. Most share {most['kind']} "
        f"and {most['other']}: {most['overlap']:.1%}.",
        rows,
    )


def _kinds(context: Context) -> str:
    return "organism" if context.specimen.name == "organism" else "python"


def _found(context: Context) -> Found:
    return probed_once(context, METHOD, functions=_kinds(context), **SETTINGS)


def _losses(found: Found) -> list[dict[str, float]]:
    """A row for each share of neurons at zero."""
    columns = zip(MASKED, *found["masked loss"].tolist(), strict=True)
    return [
        {"at zero": share, "by activation": a, "by output": b, "at random": c} for share, a, b, c in columns
    ]  # fmt: skip
