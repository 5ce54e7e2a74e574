"""Running claims on a model, with everything that they share computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data import Batches, Specimen
from ..ending import line_of
from ..errors import TransectError
from ..forward import at_rest
from ..statistics import Progress
from .context import Context
from .registry import Claim, NotApplicable, Result, Verdict, claims

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A claim with its result on one model."""

    claim: Claim
    result: Result

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        described = {name: getattr(self.claim, name) for name in ("name", "method", "paper", "statement")}
        return {**described, **asdict(self.result)}


def run_claims(
    model: Any,
    calibration: Batches | None,
    evaluation: Batches,
    names: Sequence[str] = (),
    progress: Progress | None = None,
    specimen: Specimen | None = None,
    known: Callable[[Claim], Result | None] = lambda claim: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    keeps: Sequence[float] = (),
) -> list[Outcome]:
    """Check claims on a model, which is as before afterwards.

    calibration, evaluation: see `transect.data.load`; claims that need calibration data are not applicable without it.
    names: of claims, or of methods, probes or edits for all of their claims. Default: every claim.
    specimen: the model with its tokenizer and questions, for claims about probes and edits.
    keeps: see `Context`.
    known: the result of a claim that was measured before, or None. on_outcome: called with each new outcome.
    """
    chosen = claims(names)
    before = {one.name: result for one in chosen if (result := known(one)) is not None}
    uses = dict.fromkeys(method for one in chosen if one.name not in before for method in one.uses)
    context = Context(model, calibration, evaluation, uses, progress, specimen, keeps)
    outcomes = []
    for one in progress(chosen, "claims") if progress else chosen:
        if one.name in before:
            outcomes.append(Outcome(one, before[one.name]))
            continue
        with at_rest(model):
            outcomes.append(Outcome(one, _check(one, context)))
        on_outcome(outcomes[-1])
    return outcomes


def _check(one: Claim, context: Context) -> Result:
    try:
        return one.function(context)
    except NotApplicable as reason:
        return Result(Verdict.NOT_APPLICABLE, str(reason))
    except TransectError as error:  # a compressed model that computes NaN, say; the other claims go on
        return Result(Verdict.NOT_APPLICABLE, f"It could not be measured: {error}")
    except Exception as error:  # a fault of the claim's own must not cost the others
        if line_of(error) is not None:  # no memory or room, which none of the others has either
            raise
        _logger.exception("the claim %s failed", one.name)
        return Result(Verdict.FAILED, f"{type(error).__name__}: {error}")
