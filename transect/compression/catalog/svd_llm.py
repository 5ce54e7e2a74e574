"""SVD-LLM: truncation-aware data whitening (Wang et al., ICLR 2025, arXiv:2403.07378)."""

from typing import Annotated

from torch import Tensor

from ...statistics import InputCovariance
from ..registry import Range, factorization
from ..weighted_svd import Factorization, shrink, weighted_svd


@factorization("svd-llm", paper="arXiv:2403.07378", needs=[InputCovariance()], refit=True)
def svd_llm(weight: Tensor, covariance: Tensor, *, shrinkage: Annotated[float, Range(0, 1)] = 1e-6) -> Factorization:
    """Change each layer's outputs on the calibration text as little as the rank allows.

    Minimises E||(W - Ŵ)x||² = tr((W - Ŵ) C (W - Ŵ)ᵀ), C = E[x xᵀ] uncentred: the SVD of W S for any root S of C. The
    dropped singular values squared are exactly the mean squared output error. This is the paper's stage 1, "(W)"; its
    closed-form update of the left factor is the frame's `refit`.

    shrinkage: C becomes (1 - s) C + s mean(diag C) I, so that directions never seen in calibration stay bounded. Ours;
        the authors' code adds to C only where its Cholesky factorization fails, and then an absolute amount.
    """
    return weighted_svd(weight, input_metric=shrink(covariance, shrinkage))
