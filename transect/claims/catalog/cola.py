"""Claims of Chain-of-Layers (Li et al. 2025, arXiv:2507.07996), each with the controls that its paper leaves out."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...errors import NotApplicable
from ...probes import Result as Found
from ..context import Context
from ..probing import probed
from ..registry import Result, Verdict, claim

_PAPER = "arXiv:2507.07996"
SETTINGS: dict[str, Any] = {"inputs": 24, "simulations": 100}
LEAST = 2  # questions that a share is of
_CLEAR = 2  # standard errors by which a control has to be surpassed


class Hits(NamedTuple):
    """Of the questions asked: which the search solves, which random paths do (0 or 1), and the chance of guessing."""

    searched: Tensor
    random: Tensor
    chance: Tensor

    @property
    def beyond_random(self) -> bool:
        """Whether the search solves more than random paths: of the questions that one alone solves, clearly more."""
        difference = self.searched - self.random
        return float(difference.sum()) > _CLEAR * float(difference.square().sum().sqrt())

    @property
    def beyond_guesses(self) -> bool:
        """Whether it solves more than guesses, whose hits have the variance Σ p (1 - p)."""
        variance = (self.chance * (1 - self.chance)).sum()
        return float((self.searched - self.chance).sum()) > _CLEAR * float(variance.sqrt())

    def told(self) -> str:
        """The controls in words."""
        empty, count = int((self.chance == 1).sum()), len(self.chance)
        paths, guesses = ("" if one else "not " for one in (self.beyond_random, self.beyond_guesses))
        return (
            f"{self.random.mean():.0%} by as many random paths ({paths}more than chance apart), and "
            f"{self.chance.mean():.1%} would be hit by as many different guesses ({guesses}more than chance apart; for "
            f"{empty} of the {count} every possible answer was tried, which says nothing)"
        )


@claim(
    "cola/shorter",
    method="cola",
    paper=_PAPER,
    statement="More than 75 % of the inputs that a model answers rightly have a right path of fewer layers, and a tree "
    "search finds clearly more of them than as many random paths, or guesses, do.",
)
def shorter(context: Context) -> Result:
    """On facts where there are any, and on choices otherwise; the second half of the sentence is ours."""
    found, layers = probed(context.specimen, "cola", **SETTINGS), context.specimen.layers
    of = _asked(found, right=True)
    lengths, by_random = (found[name][0][of] for name in ("searched", "random"))
    hits = Hits((lengths < layers).double(), (by_random < layers).double(), _chance(found["chance_shorter"], of))
    share = float(hits.searched.mean())
    return Result(
        Verdict.of(share > 0.75 and hits.beyond_random and hits.beyond_guesses),
        f"Of {len(lengths)} questions answered rightly, {share:.0%} have a right path of fewer layers (mean length "
        f"of the shortest {float(lengths.nanmean()):.2f} of {layers}), {hits.told()}.",
        _rows(found, of),
    )


@claim(
    "cola/corrected",
    method="cola",
    paper=_PAPER,
    statement="More than 60 % of the inputs that a model answers wrongly have some right path, and a tree search finds "
    "clearly more of them than as many random paths, or guesses, do.",
)
def corrected(context: Context) -> Result:
    """On choices where there are any, and on facts otherwise; the second half of the sentence is ours."""
    kind = "choices" if context.specimen.known_choices else "facts"
    found = probed(context.specimen, "cola", kind=kind, **SETTINGS)
    of = _asked(found, right=False)
    searched, by_random = (found[name][0][of].isfinite().double() for name in ("searched", "random"))
    hits = Hits(searched, by_random, _chance(found["chance"], of))
    share = float(hits.searched.mean())
    return Result(
        Verdict.of(share > 0.6 and hits.beyond_random and hits.beyond_guesses),
        f"Of {int(of.sum())} questions ({kind}) answered wrongly, {share:.0%} have some right path, {hits.told()}.",
        _rows(found, of),
    )


def _asked(found: Found, right: bool) -> Tensor:
    """Which questions the model as it is answers rightly, or wrongly; not applicable where these are too few."""
    of = (found["plain"] > 0) == right
    if int(of.sum()) < LEAST:
        how = "rightly" if right else "wrongly"
        raise NotApplicable(f"the model answers {int(of.sum())} of the questions {how}, and {LEAST} are needed")
    return of


def _chance(by_space: Tensor, of: Tensor) -> Tensor:
    """Of guessing, for these questions; 1 where there is one possible answer only."""
    return by_space[0][of].nan_to_num(1.0)


def _rows(found: Found, of: Tensor) -> list[dict[str, Any]]:
    columns = {name: found[name][0].tolist() for name in ("searched", "random", "answers", "chance", "chance_shorter")}
    return [
        {"question": found.labels["question"][number], "path": found.labels["program"][number]}
        | {name: (None if column[number] != column[number] else column[number]) for name, column in columns.items()}
        for number in of.nonzero()[:, 0].tolist()
    ]
