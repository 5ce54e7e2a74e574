"""Claim of L2 Adaptive Computation (Shemiranifar 2025, arXiv:2505.14467)."""

from __future__ import annotations

from ..context import Context
from ..probing import probed
from ..registry import Result, Verdict, claim

PROMPTS = 64


@claim(
    "lac/phases",
    method="lac",
    paper="arXiv:2505.14467",
    statement="The layers that count as active differ between the tokens of a prompt and those that the model "
    "generates.",
)
def phases(context: Context) -> Result:
    """The difference of the two activity profiles against that of random halves of one phase, at the default alpha.

    It holds where the difference exceeds what 95 % of random halves of the prompts, and of the generated texts, stay
    below. Halves are of whole texts, since the tokens of one text go together; each has half of the tokens, which makes
    the bar higher. The other alphas are shown beside, and so are the text's own tokens at the places of the
    generated ones, which is our control.
    """
    found = probed(context.specimen, "lac", prompts=PROMPTS)
    names = found.labels["pair"]
    rows = [
        {"alpha": float(alpha)}
        | {name: float(found["difference"][number, column]) for number, name in enumerate(names)}
        | {
            f"active, {phase}": float(found["active_share"][number, column])
            for number, phase in enumerate(found.labels["phase"])
        }
        | {
            f"loss, {reading}": float(found["loss"][number, column])
            for number, reading in enumerate(found.labels["reading"])
        }
        for column, alpha in enumerate(found.labels["alpha"])
    ]
    at = found.labels["alpha"].index("0.8")
    between, text, other, *halves = found["difference"][:, at].tolist()
    noise = max(halves)
    clear = [row["alpha"] for row in rows if row[names[0]] > max(row[names[3]], row[names[4]])]
    return Result(
        Verdict.of(between > noise),
        f"At alpha 0.8 the share of active tokens differs by {between:.4f} a layer between the phases, and by less "
        f"than {noise:.4f} between 95 % of random halves of one phase. The text's own tokens at the places of the "
        f"generated ones differ by {text:.4f} from the prompts and by {other:.4f} from the generated ones"
        + (": what differs is what the model writes, not how it reads." if text <= halves[0] < between else ".")
        + " A causal model computes both phases alike. The difference exceeds that of halves at alpha: "
        f"{', '.join(f'{alpha:g}' for alpha in clear) or 'none'}.",
        rows,
    )
