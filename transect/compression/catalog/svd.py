"""Plain truncated SVD (Eckart and Young, 1936)."""

from torch import Tensor

from ..registry import factorization
from ..weighted_svd import Factorization, weighted_svd


@factorization("svd", paper="Eckart & Young 1936, doi:10.1007/BF02288367")
def svd(weight: Tensor) -> Factorization:
    """Keep the largest singular values of W: the least change of the weights themselves.

    Minimises ||W - Ŵ||_F². Uses no data.
    """
    return weighted_svd(weight)
