"""Claims of CoSpaDi (Makhov, Shopkhoev et al., 2025, arXiv:2509.22075)."""

from __future__ import annotations

from dataclasses import replace

from ...compression import method as registered
from ...compression.dictionary_learning import dictionary_size, nominal_kept
from ..context import Context, Variant
from ..ordering import KEEPS, claim_order, ordered
from ..registry import Result, claim

SVD, SVD_LLM = registered("svd"), registered("svd-llm")
COSPADI, SHARED = registered("cospadi"), registered("cospadi-shared")
PAPER = COSPADI.paper


@claim(
    "cospadi/below-svd-llm",
    method="cospadi",
    paper=PAPER,
    statement="At the same stored bytes, CoSpaDi loses less than SVD-LLM, and that less than plain SVD.",
    uses=["svd", "svd-llm", "cospadi"],
)
def below_svd_llm(context: Context) -> Result:
    """The paper's headline, with the support's bits counted, which the paper's 14-bit coefficients pay for.

    The explanation also says what the paper's count, dictionary and non-zeros alone, would call the same models.
    """
    context.require_language_model()
    result = ordered(context, (Variant(COSPADI), Variant(SVD_LLM)), (Variant(SVD_LLM), Variant(SVD)))
    nominal = ", ".join(f"{keep:g} is {nominal_share(context, keep):.3f}" for keep in context.budgets(KEEPS))
    return replace(result, explanation=f"{result.explanation} CoSpaDi by the paper's count of bytes: {nominal}.")


def nominal_share(context: Context, keep: float) -> float:
    """Share of the matrices' numbers that the paper counts at the sizes that `cospadi` chooses for this budget."""
    ratio = COSPADI.settings({})["ratio"]
    counted = whole = 0.0
    for matrix in context.matrices:
        d_out, d_in = matrix.shape
        chosen = dictionary_size(matrix.shape, matrix.module.weight.element_size(), keep, ratio).chosen
        counted += nominal_kept(matrix.shape, **chosen) * d_out * d_in
        whole += d_out * d_in
    return counted / whole


# The paper's grouped version against its single one.
claim_order(
    "cospadi-shared/below-cospadi", (Variant(SHARED), Variant(COSPADI)),
    paper=PAPER,
    statement="At the same stored bytes, one dictionary for two layers loses less than one for each.",
)  # fmt: skip


# Both with the same rule for when to stop.
claim_order(
    "cospadi/start", (Variant(COSPADI), Variant(COSPADI, settings=(("start", "columns"),))),
    paper="Transect's own",
    statement="Starting from singular vectors loses less than starting from drawn columns, the paper's start.",
)  # fmt: skip
