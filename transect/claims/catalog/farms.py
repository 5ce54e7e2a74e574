"""Claims of FARMS (Hu et al., ICML 2025, arXiv:2506.06280)."""

from __future__ import annotations

from ...compression import method as registered
from ...compression.allocation import allocation_named
from ..context import Context, Variant
from ..ordering import KEEPS, beside_dense, compare, judge
from ..registry import Result, claim

_CUT_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)  # below, the block that loses most would have no head left in a small model


@claim(
    "farms/below-uniform",
    method="farms",
    paper=allocation_named("farms").paper,
    statement="Taking more from blocks whose weights have a light-tailed spectrum loses less than equal shares.",
    uses=["svd-llm", "amp"],
)
def below_uniform(context: Context) -> Result:
    """The default epsilon, untuned, with a factorization and with AMP; the paper prunes single weights, more deeply."""
    context.require_language_model()
    pairs = [("svd-llm", keep) for keep in KEEPS] + [("amp", keep) for keep in _CUT_KEEPS]
    found = [
        compare(context, Variant(registered(name), "farms"), Variant(registered(name)), keep) for name, keep in pairs
    ]
    return beside_dense(context, judge(found))
