"""Claims of the form "this loses less than that at the same size", judged at every budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..compression import methods
from .context import Context, Measured, Variant
from .registry import Result, Verdict, claim

KEEPS = (0.8, 0.6, 0.4, 0.3)
_CLEAR = 2  # a difference of fewer standard errors may be chance


@dataclass(frozen=True)
class Comparison:
    """Two compressed models of one budget; `better` is the one whose loss is claimed to be lower.

    kept: shares of the matrices' bytes. difference: loss of `better` minus loss of `worse`, in nats; standard_error: of
    the difference, over held-out sequences.
    """

    keep: float
    better: str
    worse: str
    better_kept: float
    worse_kept: float
    better_loss: float
    worse_loss: float
    difference: float
    standard_error: float

    @property
    def clear(self) -> bool:
        """Whether the difference is more than chance would make it."""
        return abs(self.difference) >= _CLEAR * self.standard_error


def compare(context: Context, better: Variant, worse: Variant, keep: float) -> Comparison:
    """Measure both variants at one budget."""
    first, second = context.compressed(better, keep), context.compressed(worse, keep)
    return comparison(keep, (better.name, first), (worse.name, second))


def comparison(keep: float, better: tuple[str, Measured], worse: tuple[str, Measured]) -> Comparison:
    """Two measured models, each with its name, as `judge` takes them."""
    (name, first), (other, second) = better, worse
    return Comparison(
        keep, name, other, first.kept, second.kept, first.loss, second.loss, *first.minus(second)
    )  # fmt: skip


def judge(comparisons: Sequence[Comparison], or_equal: bool = False) -> Result:
    """It holds if every measured difference has the claimed sign; what may be chance is named. or_equal: 0 will do."""
    failed = [one for one in comparisons if not (one.difference < 0 or (or_equal and one.difference == 0))]
    unclear = [one for one in comparisons if not one.clear]
    told = [f"The claimed order in {len(comparisons) - len(failed)} of {len(comparisons)} comparisons"]
    if failed:
        told.append("Not for " + _listed(failed))
    if unclear:
        told.append(f"Within {_CLEAR} standard errors of 0: " + _listed(unclear))
    numbers = [{**asdict(one), "clear": one.clear} for one in comparisons]
    return Result(Verdict.DOES_NOT_HOLD if failed else Verdict.HOLDS, ". ".join(told), numbers)


def _listed(comparisons: Sequence[Comparison]) -> str:
    """E.g. `fwsvd against svd at 0.8, 0.6`."""
    keeps: dict[tuple[str, str], list[str]] = {}
    for one in comparisons:
        keeps.setdefault((one.better, one.worse), []).append(f"{one.keep:g}")
    return "; ".join(f"{better} against {worse} at {', '.join(at)}" for (better, worse), at in keeps.items())


def claim_order(
    name: str,
    *pairs: tuple[Variant, Variant],
    paper: str,
    statement: str,
    keeps: Sequence[float] | None = None,
    or_equal: bool = False,
    any_task: bool = False,
) -> None:
    """Register the claim that the first of each pair loses less than the second (`ordered`), and nothing else.

    name, paper, statement: see `Claim`; the method is what stands before the name's slash.
    keeps: budgets of the claim's own, see `ordered_at`; those that a user asks for take their place.
    any_task: not of language models alone.
    """
    known = {method.name for method in methods()}
    uses = dict.fromkeys(variant.method.name for pair in pairs for variant in pair if variant.method.name in known)

    @claim(name, method=name.split("/")[0], paper=paper, statement=statement, uses=list(uses))
    def check(context: Context) -> Result:
        if not any_task:
            context.require_language_model()
        if keeps is None:
            return ordered(context, *pairs, or_equal=or_equal)
        return at_budgets(context, ordered_at(context, context.budgets(keeps), *pairs, or_equal=or_equal))


def ordered(context: Context, *pairs: tuple[Variant, Variant], or_equal: bool = False) -> Result:
    """Judge that the first of each pair loses less than the second, at every budget."""
    for keep in context.budgets(KEEPS):
        context.require_keep(keep)
    return at_budgets(context, ordered_at(context, context.budgets(KEEPS), *pairs, or_equal=or_equal))


def ordered_at(
    context: Context, keeps: Sequence[float], *pairs: tuple[Variant, Variant], or_equal: bool = False
) -> Result:
    """The same at budgets of the claim's own, for methods that are not bound to ranks."""
    result = judge([compare(context, *pair, keep) for pair in pairs for keep in keeps], or_equal)
    return beside_dense(context, result)


def at_budgets(context: Context, result: Result) -> Result:
    """The result, saying at which budgets it is where they are not the claim's own."""
    if not context.keeps:
        return result
    asked = ", ".join(f"{keep:g}" for keep in context.keeps)
    return replace(result, explanation=f"{result.explanation.rstrip('.')}. Asked at {asked} alone.")


def beside_dense(context: Context, result: Result) -> Result:
    """The result with the dense model's loss at the end of its explanation."""
    return replace(result, explanation=f"{result.explanation}. Dense loss {context.dense.loss:.4f}.")
