"""CoSpaDi: calibration-guided sparse dictionary learning (Makhov, Shopkhoev et al., 2025, arXiv:2509.22075)."""

from typing import Annotated

from torch import Tensor

from ...operators.dictionary import SparseDictionary
from ...statistics import InputCovariance
from ..dictionary_learning import Start, dictionary_size, learn
from ..registry import Range, Seed, Size, replacement


def size(shape: tuple[int, int], itemsize: int, keep: float, *, ratio: float, **settings: object) -> Size:
    """The largest dictionary and coefficients of that ratio that `keep` pays for."""
    return dictionary_size(shape, itemsize, keep, ratio)


@replacement("cospadi", paper="arXiv:2509.22075", size=size, needs=[InputCovariance()], refit=True)
def cospadi(
    weight: Tensor,
    covariance: Tensor,
    *,
    atoms: int,
    nonzeros: int,
    ratio: Annotated[float, Range(1, 16)] = 2.0,
    start: Start = "svd",
    iterations: Annotated[int, Range(1, 10_000)] = 60,
    tolerance: Annotated[float, Range(0, 1)] = 0.1,
    shrinkage: Annotated[float, Range(0, 1)] = 1e-6,
    seed: Seed = 42,
) -> SparseDictionary:
    """Build each output unit from a few atoms of a learned dictionary, so that a layer's outputs change little.

    Minimises E||(W - S D) x||² by OMP and K-SVD, over D (k x d_in) and S (d_out x k) of s non-zeros a row. In the end
    the non-zeros are fitted anew on their support, in float64 (ours; the paper ends with the last K-SVD sweep). Stored:
    D and the non-zeros in the model's own dtype, and one bit for every entry of S. The paper's nominal ratio leaves
    those bits out, since it stores 14-bit coefficients; so at the same nominal ratio its k and s are larger than here.

    ratio: atoms per non-zero, ρ = k/s; the support costs ρ bits a non-zero.
    start: atoms to start from: singular vectors, our default, or columns of the whitened matrix drawn at random, the
        paper's.
    iterations: most rounds of coding and dictionary update; the paper does 60.
    tolerance: stop once five rounds lower the squared error by less than this share (our rule); 0 does all rounds, as
        the paper does.
    shrinkage: C = E[x xᵀ] becomes (1 - a) C + a mean(diag C) I, so that directions never seen stay bounded; how the
        paper does that is not known to us.
    seed: of the columns drawn; the paper's.
    """
    made = learn(
        weight, covariance, atoms, nonzeros,
        start=start, iterations=iterations, tolerance=tolerance, shrinkage=shrinkage, seed=seed,
    )  # fmt: skip
    return SparseDictionary.from_factors(made.dictionary, made.values, made.indices)
