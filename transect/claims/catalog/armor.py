"""Claims of ARMOR (Liu et al., ICLR 2026, arXiv:2510.05528)."""

from __future__ import annotations

from dataclasses import asdict, replace

from ...compression import method as registered
from ...compression.sizes import dense_bytes
from ...compression.two_four import two_four_size
from ..context import Context, Variant
from ..ordering import beside_dense, claim_order, compare, comparison, judge, ordered_at
from ..registry import Result, Verdict, claim

ARMOR, MAGNITUDE = Variant(registered("armor")), Variant(registered("magnitude"))
NOWAG_P, WANDA, SPARSEGPT = (Variant(registered(name)) for name in ("nowag-p", "wanda", "sparsegpt"))
PAPER = ARMOR.method.paper
_KEEPS = (0.8, 0.7)  # what all of them reach on small models; 2:4 alone stores 0.53 or 0.56, ARMOR's wrappers add to it
_ALIKE = 0.1
_BASELINES = (NOWAG_P, WANDA, SPARSEGPT)


def smallest(context: Context) -> float:
    """The budget at which every matrix is 2:4."""
    return max(
        two_four_size(matrix.shape, matrix.module.weight.element_size(), float("inf")).bytes / dense_bytes(matrix)
        for matrix in context.matrices
    )


@claim(
    "armor/below-2:4",
    method="armor",
    paper=PAPER,
    statement="With all matrices 2:4, ARMOR, at a few bytes more, loses less than NoWag-P, Wanda and SparseGPT.",
    uses=["armor", "nowag-p", "wanda", "sparsegpt"],
)
def below_two_four(context: Context) -> Result:
    """The paper's headline. Its wrappers add a few per cent at width 4096; on a small model they cost far more, so look
    at the kept shares beside the losses, and at `armor/equal-bytes`.
    """
    context.require_language_model()
    keep = smallest(context)
    armor = context.compressed(ARMOR, _KEEPS[-1])
    comparisons = [
        comparison(_KEEPS[-1], (ARMOR.name, armor), (other.name, context.compressed(other, keep)))
        for other in _BASELINES
    ]
    result = judge(comparisons)
    shares = f"ARMOR keeps {armor.kept:.3f} of the bytes, the others {comparisons[0].worse_kept:.3f}"
    return beside_dense(context, replace(result, explanation=f"{result.explanation}. {shares}"))


@claim(
    "armor/nowag-p-beside-wanda",
    method="armor",
    paper=PAPER,
    statement="With all matrices 2:4, ARMOR's start, NoWag-P, is about as good as Wanda: the two differ by less than a "
    "tenth of what Wanda adds to the loss.",
    uses=["nowag-p", "wanda"],
)
def nowag_p_beside_wanda(context: Context) -> Result:
    """In the paper's tables the logarithms of their perplexities differ by 1 to 5 % of that; the bound is ours."""
    context.require_language_model()
    found = compare(context, NOWAG_P, WANDA, smallest(context))
    added = found.worse_loss - context.dense.loss
    share = abs(found.difference) / added if added > 0 else float("inf")
    told = f"They differ by {found.difference:+.4f}, and Wanda adds {added:.4f}: a share of {share:.3f}"
    verdict = Verdict.of(share < _ALIKE)
    return beside_dense(context, Result(verdict, told, [asdict(found)]))


# Whether the wrappers are worth their bytes: the others spend them on dense matrices, spread over the model.
claim_order(
    "armor/equal-bytes", *((ARMOR, other) for other in _BASELINES),
    paper="Transect's own",
    statement="At the same size, ARMOR loses less than NoWag-P, Wanda and SparseGPT with some matrices left dense.",
    keeps=_KEEPS,
)  # fmt: skip


@claim(
    "armor/baselines",
    method="armor",
    paper="arXiv:2301.00774, arXiv:2306.11695",
    statement="With all matrices 2:4, SparseGPT and Wanda lose less than magnitude pruning.",
    uses=["magnitude", "wanda", "sparsegpt"],
)
def baselines(context: Context) -> Result:
    """The headline of the two papers that ARMOR compares itself with."""
    context.require_language_model()
    return ordered_at(context, (smallest(context),), (SPARSEGPT, MAGNITUDE), (WANDA, MAGNITUDE))
