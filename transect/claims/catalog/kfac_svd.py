"""Claims of KFAC-SVD and LEMS (Thoma et al., ICML 2026, OpenReview IjIgNPFuCt)."""

from __future__ import annotations

from torch import Tensor

from ...compression import Factorization, Method, weighted_svd
from ...compression import method as registered
from ...compression.cholesky import raised_cholesky
from ...compression.weighted_svd import shrink
from ..context import Variant
from ..ordering import claim_order

SVD, SVD_LLM, KFAC_SVD = registered("svd"), registered("svd-llm"), registered("kfac-svd")
PAPER = KFAC_SVD.paper
UNIFORM = Variant(KFAC_SVD, "uniform")


# The paper's headline for its factorization, with uniform ranks.
claim_order(
    "kfac-svd/below-svd-llm", (UNIFORM, Variant(SVD_LLM)), (Variant(SVD_LLM), Variant(SVD)),
    paper=PAPER,
    statement="At the same size, KFAC-SVD loses less than SVD-LLM, and that less than plain SVD.",
)  # fmt: skip


# The paper's headline for its allocation.
claim_order(
    "kfac-svd/searched-ranks", (Variant(KFAC_SVD, "ilp"), UNIFORM),
    paper=PAPER,
    statement="Ranks found by LEMS's search (`ilp`) lose no more than uniform ones of the same budget.",
    or_equal=True,
)  # fmt: skip


# KFAC-SVD's singular values are all in units of the loss, so they can be compared across matrices.
claim_order(
    "kfac-svd/ranked-components", (Variant(KFAC_SVD, "global"), UNIFORM),
    paper="Transect's own",
    statement="Ranks from one ranking of all matrices' components (`global`) lose no more than uniform ones.",
    or_equal=True,
)  # fmt: skip


def as_released(weight: Tensor, covariance: Tensor, gradient_covariance: Tensor) -> Factorization:
    """KFAC-SVD as the authors' code computes it: the SVD of L_Γ W L_A, where the objective has L_Γᵀ.

    That minimises tr(Γ' (W - Ŵ) A (W - Ŵ)ᵀ) with Γ' = L_Γᵀ L_Γ instead of Γ = L_Γ L_Γᵀ.
    """
    defaults = KFAC_SVD.settings({})
    root, _ = raised_cholesky(shrink(gradient_covariance, defaults["gradient_shrinkage"]))
    return weighted_svd(weight, root.T @ root, shrink(covariance, defaults["input_shrinkage"]))


RELEASED = Method("kfac-svd released", "factorization", PAPER, as_released, KFAC_SVD.needs)


# Whether the orientation bug in the authors' code matters on a whole model.
claim_order(
    "kfac-svd/orientation", (UNIFORM, Variant(RELEASED)),
    paper="Transect's own",
    statement="The objective's orientation, L_Γᵀ W L_A, loses less than the released code's L_Γ W L_A.",
)  # fmt: skip
