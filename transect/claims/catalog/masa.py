"""Claims of MASA (Zhussip et al., AAAI 2026, arXiv:2508.04581)."""

from __future__ import annotations

from ...compression import Recipe, compress_anatomy
from ...compression import method as registered
from ...compression.catalog.masa import families_of, family_bytes
from ...compression.compress import outcome_of
from ...compression.copying import working_copy
from ..context import Context, Measured, Variant
from ..ordering import comparison, judge
from ..registry import NotApplicable, Result, claim

MASA = registered("masa")
SHARE = 0.8  # of the shared matrices' bytes


@claim(
    "masa/below-svd-llm",
    method="masa",
    paper=MASA.paper,
    statement="With 20 % of attention removed and no training, MASA's conversion loses less than SVD-LLM.",
    uses=["masa", "svd-llm"],
)
def below_svd_llm(context: Context) -> Result:
    """The paper's headline for its conversion: the same matrices, the same bytes; once without and once with o."""
    context.require_language_model()
    comparisons = []
    for projections in ("qkv", "qkvo"):
        targeted = sum(map(family_bytes, families_of(context.anatomy, projections, 0)))
        if not targeted:
            raise NotApplicable("no two neighbouring blocks have attention matrices of the same shapes")
        keep = 1 - (1 - SHARE) * targeted / context.anatomy.matrix_bytes()
        variant = Variant(MASA, settings=(("projections", projections),))
        mixtures, factors = context.compressed(variant, keep), svd_llm_on(context, projections)
        other = f"svd-llm of {', '.join(projections)}"
        comparisons.append(comparison(keep, (variant.name, mixtures), (other, factors)))
    return judge(comparisons)


def svd_llm_on(context: Context, projections: str) -> Measured:
    """SVD-LLM with uniform ranks on the matrices that masa would share, and on no others."""
    anatomy = working_copy(context.anatomy)
    matrices = [matrix for family in families_of(anatomy, projections, 0) for matrix in family]
    compress_anatomy(
        anatomy, Recipe("svd-llm", SHARE), context.calibration, matrices=matrices, statistics=context.statistics
    )
    return context.evaluate(anatomy.model, outcome_of(anatomy, None, context.anatomy.matrix_bytes())["kept"])
