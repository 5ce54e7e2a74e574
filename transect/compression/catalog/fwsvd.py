"""FWSVD: Fisher-weighted SVD (Hsu et al., ICLR 2022, arXiv:2207.00112)."""

import warnings
from typing import Literal

from torch import Tensor

from ...statistics import FisherDiagonal
from ..registry import factorization
from ..weighted_svd import Factorization, weighted_svd


@factorization("fwsvd", paper="arXiv:2207.00112", needs=[FisherDiagonal()], allocation="global")
def fwsvd(weight: Tensor, fisher: Tensor, *, axis: Literal["out", "in"] = "out") -> Factorization:
    """Spend the rank on the rows of W that the loss is sensitive to, by the diagonal Fisher information.

    Minimises Σ_i ι_i ||W_i - Ŵ_i||² with ι_i = Σ_j I_ij, the Fisher information I (d_out x d_in) pooled over a row.
    The element-wise weighted problem has no closed form; pooling is the paper's step. A row counts at least a millionth
    of the mean (our floor), so that dead rows can be weighed.

    Singular values are in units of the loss, if roughly, so that by default ranks come from one ranking of all the
    components (`global`): on SmolLM2-135M at 0.9 of the bytes equal shares, which the paper has (`uniform`), cost
    12.6 nats and these 0.3.

    axis: "out" pools each row of W (an output feature), as the paper's restatements in this layout do; "in" pools
        each column instead, the variant of later LLM code.
    """
    importance = fisher.sum(1) if axis == "out" else fisher.mean(0)
    if not importance.any():
        warnings.warn("the Fisher information of a matrix is all zero: plain SVD is used for it", stacklevel=2)
    # A row that no gradient reached (a dead unit) is floored relative to the mean, so that D⁻¹ stays finite.
    importance = importance.clamp_min(1e-6 * importance.mean())
    if axis == "out":
        return weighted_svd(weight, output_metric=importance)
    return weighted_svd(weight, input_metric=importance)
