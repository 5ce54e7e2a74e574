"""Claims of mixed structures, Transect's own."""

from __future__ import annotations

from ...compression import method as registered
from ..context import Context, Variant
from ..ordering import compare, judge
from ..registry import Result, claim

MIXED = registered("mixed")
_KEEPS = (0.8, 0.6, 0.4)
# Each part at its best: with the allocation that suits it.
_PARTS = (
    Variant(registered("kfac-svd"), "ilp"), Variant(registered("kfac-svd"), "global"), Variant(registered("cospadi")),
    Variant(registered("modegpt"), "similarity"),
)  # fmt: skip


@claim(
    "mixed/no-worse-than-its-parts",
    method="mixed",
    paper="Transect's own",
    statement="Mixed structures lose no more than low rank, dictionaries or narrower layers alone, at the same size.",
    uses=["mixed", "kfac-svd", "cospadi", "modegpt"],
)
def no_worse_than_its_parts(context: Context) -> Result:
    """Against every part with its best allocation."""
    context.require_language_model()
    for keep in _KEEPS:
        context.require_keep(keep)
    pairs = [compare(context, Variant(MIXED), part, keep) for part in _PARTS for keep in _KEEPS]
    return judge(pairs, or_equal=True)


@claim(
    "mixed/refit",
    method="mixed",
    paper="Transect's own",
    statement="Refitting the operators to the dense model's outputs lowers the loss.",
    uses=["mixed"],
)
def refit(context: Context) -> Result:
    """The same choice of structures, with and without the refit."""
    context.require_language_model()
    without = Variant(MIXED, settings=(("refit_outputs", False),))
    return judge([compare(context, Variant(MIXED), without, keep) for keep in _KEEPS])
