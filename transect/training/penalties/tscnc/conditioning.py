"""How far a matrix is from a flat spectrum, as numbers with gradients; and the determinant that the paper puts there.

W is m x n, q = min(m, n), and σ are its q singular values. G is the smaller Gram matrix (q x q), with eigenvalues σ².
All is computed in float64, at the cost of O(q² max(m, n)): squaring halves the digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ....errors import TransectError

EPSILON = 1e-5  # the paper's; it keeps the logarithms finite
FLOOR = math.log(EPSILON) ** 2  # of a singular matrix, 132.5
_LEAST = 1e-300  # that a zero matrix is divided by


def raw(weight: Tensor) -> Tensor:
    """(ln(1e-5 + det(G / q)))², the released code's: 0 where the volume is 1, whatever the condition number is.

    det(G / q) = Π σ² / q^q is a volume. From det ≫ 1 descent shrinks it, the small σ first, and below det = 1e-5 there
    is no gradient.
    """
    gram = _gram(weight)
    return _squared_log(gram / gram.shape[0], weight)


def normalized(weight: Tensor) -> Tensor:
    """The same of q W / ‖W‖_F: 0 (up to 1e-10) where all σ are equal, and only there.

    det(q G / ‖W‖²) <= 1 by the inequality of arithmetic and geometric means. It falls off exponentially with q: of a
    random square matrix it is about e^-q, so that from q = 20 on there is hardly a gradient.
    """
    gram = _gram(weight)
    return _squared_log(gram / _mean(gram), weight)


def spread(weight: Tensor) -> Tensor:
    """ln(1 + 1e-5) - mean ln(σ² / mean σ² + 1e-5): 0 where all σ are equal, and only there (ours).

    The logarithm of the arithmetic over the geometric mean of σ², which 1e-5 keeps below 11.5. So it is the logarithm
    of the normalized determinant for each dimension: any q gives numbers of one size, with gradients at small σ of at
    most 316 / (q root mean square σ), and at singular matrices, too.
    """
    gram = _gram(weight)
    lifted = gram / _mean(gram) + EPSILON * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return math.log1p(EPSILON) - torch.linalg.slogdet(lifted).logabsdet / len(gram)


def kappa(weight: Tensor) -> Tensor:
    """ln(σ_max / (σ_min + 1e-5 σ_max)): the logarithm of the condition number, at most 11.5 (a zero matrix has that).

    Only two σ get a gradient, which reaches 1e5 / σ_max at singular matrices. By a singular value decomposition, about
    three times as slow as a determinant.
    """
    wide = _checked(weight)
    if not bool(wide.isfinite().all() and wide.any()):  # NaN stays NaN, where the routine would raise an error
        return 0.0 * wide.sum() - math.log(EPSILON)
    values = torch.linalg.svdvals(wide)
    return values[0].log() - (values[-1] + EPSILON * values[0]).log()


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": spread, "normalized": normalized, "kappa": kappa, "raw": raw,
}  # fmt: skip


def _checked(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.numel():
        raise TransectError(f"a condition number is of a matrix with entries, and this has shape {list(weight.shape)}")
    return weight.double()


def _gram(weight: Tensor) -> Tensor:
    wide = _checked(weight)
    return wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide


def _mean(gram: Tensor) -> Tensor:
    """The mean eigenvalue, for division."""
    return (gram.trace() / len(gram)).clamp_min(_LEAST)


def _squared_log(gram: Tensor, weight: Tensor) -> Tensor:
    """(ln(1e-5 + det))², by the logarithm of det, which over- and underflows otherwise.

    Of a singular matrix det has no gradient here, as in the formula, where it is that of a square.
    """
    sign, logarithm = torch.linalg.slogdet(gram)
    if not (sign > 0 and logarithm > -math.inf):
        return FLOOR + 0.0 * weight.double().sum()  # NaN stays NaN
    return torch.logaddexp(logarithm.new_tensor(math.log(EPSILON)), logarithm).square()
