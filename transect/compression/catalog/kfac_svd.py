"""KFAC-SVD: two-sided whitening (Thoma et al., "LEMS", ICML 2026, OpenReview IjIgNPFuCt)."""

from typing import Annotated

from torch import Tensor

from ...statistics import InputCovariance, OutputGradientCovariance
from ..registry import Range, factorization
from ..weighted_svd import Factorization, shrink, weighted_svd


@factorization(
    "kfac-svd",
    paper="openreview:IjIgNPFuCt",
    needs=[InputCovariance(), OutputGradientCovariance(trim=0.125, clip=(0.1, 10.0))],
    allocation="global",
)
def kfac_svd(
    weight: Tensor,
    covariance: Tensor,
    gradient_covariance: Tensor,
    *,
    input_shrinkage: Annotated[float, Range(0, 1)] = 0.1,
    gradient_shrinkage: Annotated[float, Range(0, 1)] = 0.3,
) -> Factorization:
    """Change the loss as little as the rank allows, to second order, with Kronecker-factored curvature.

    Minimises tr(Γ (W - Ŵ) A (W - Ŵ)ᵀ) with A = E[x xᵀ] and Γ = E[g gᵀ], token by token: the SVD of L_Γᵀ W L_A. The
    authors' released code multiplies by L_Γ where its objective needs L_Γᵀ; this is the objective's form.

    All singular values are in units of the loss, so that by default ranks come from one ranking of all matrices'
    components (`global`), which loses a fraction of what equal shares do on real models. The paper compares with
    `uniform` shares and searches ranks by `ilp`.

    For text, an eighth of the positions at either end of a sequence is left out of Γ, and gradients are clamped to 0.1
    to 10 times their sequence's mean norm, as in that code.

    input_shrinkage: A becomes (1 - a) A + a mean(diag A) I; the default is the authors'.
    gradient_shrinkage: likewise for Γ; the authors use 0.3 for text and 0.7 for images.
    """
    return weighted_svd(weight, shrink(gradient_covariance, gradient_shrinkage), shrink(covariance, input_shrinkage))
