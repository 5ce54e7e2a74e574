"""A claim of gamma-MoD (Luo et al., 2024, arXiv:2410.13859)."""

from __future__ import annotations

from ...forward.attention_rank import attention_ranks
from ..context import Context, Measured
from ..ordering import comparison, judge
from ..registry import NotApplicable, Result, claim
from ..routed import beginning, converted, loss_of


@claim(
    "gamma-mod/lowest-ranks",
    method="gamma-mod",
    paper="arXiv:2410.13859",
    statement="Before any training, routing half of the context around the blocks whose attention maps have the lowest "
    "rank loses less than around those with the highest.",
)
def lowest_ranks(context: Context) -> Result:
    """A quarter and a half of the blocks. The router is random, the same for both, and weighs nothing (p = 1)."""
    routable = beginning(context)
    count = len(context.anatomy.blocks)
    if count < 2:
        raise NotApplicable("the model has a single block")
    ranks = attention_ranks(context.anatomy, context.calibration)
    order = [number for number in ranks.argsort().tolist() if ranks[number].isfinite()]
    if len(order) < count:
        raise NotApplicable("a block of this model gives no attention map")

    def routed(chosen: list[int]) -> Measured:
        layers = ",".join(map(str, sorted(chosen)))
        settings = {"routable": routable, "layers": layers, "choose": "top", "start": 30.0}
        return loss_of(context, converted(context, "gamma-mod", settings), routable)

    found = []
    for share in dict.fromkeys((max(1, count // 4), max(1, count // 2))):
        low, high = routed(order[:share]), routed(order[-share:])
        found.append(comparison(share / count, ("lowest ranks", low), ("highest ranks", high)))
    judged = judge(found)
    dense = loss_of(context, context.fresh().model, routable)
    told = (
        f"{judged.explanation}. Mean ranks {', '.join(f'{float(rank):.1f}' for rank in ranks)}; loss of the model as "
        f"it was {dense.loss:.4f}, with {routable} routable tokens."
    )
    return Result(judged.verdict, told, judged.numbers)
