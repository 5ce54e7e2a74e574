"""ASVD: activation-aware SVD (Yuan et al., 2023, arXiv:2312.05821)."""

from typing import Annotated

from torch import Tensor

from ...statistics import FeatureNorm
from ..registry import Range, factorization
from ..weighted_svd import Factorization, weighted_svd


@factorization("asvd", paper="arXiv:2312.05821", needs=[FeatureNorm(power=1)])
def asvd(weight: Tensor, magnitude: Tensor, *, alpha: Annotated[float, Range(0, 2)] = 0.5) -> Factorization:
    """Scale each input feature by its activations' mean magnitude to the power alpha before the SVD.

    SVD of W S with S = diag((E|x_j|)^alpha), then S⁻¹ is folded back into the right factor. A feature that is never on
    counts like one of a millionth of the mean magnitude, so that S has an inverse (our floor).

    alpha: how strongly large activations count; 0 is plain SVD.
    """
    scale = magnitude.clamp_min(1e-6 * magnitude.mean()) ** alpha
    return weighted_svd(weight, input_metric=scale**2)
