"""CoSpaDi with one dictionary for several layers (Makhov, Shopkhoev et al., 2025, arXiv:2509.22075)."""

from collections.abc import Iterator
from typing import Annotated

import torch

from ...anatomy import Anatomy, Matrix
from ...errors import OutOfReach
from ...operators import Bank
from ...operators.dictionary import SharedSparseDictionary
from ...statistics import InputCovariance, key_of
from ..dictionary_learning import Start, dictionary_size, learn
from ..frame import put
from ..registry import Calibration, Range, Seed, Size, restructuring


def check(anatomy: Anatomy, keep: float, *, layers: int, ratio: float, **settings: object) -> None:
    """Raise OutOfReach where a group's share pays for no atom."""
    for group in groups_of(anatomy, layers):
        size_of(group, keep, ratio)


@restructuring("cospadi-shared", paper="arXiv:2509.22075", needs=[InputCovariance()], check=check)
def cospadi_shared(
    anatomy: Anatomy,
    calibration: Calibration,
    keep: float,
    *,
    layers: Annotated[int, Range(2, 1000)] = 2,
    ratio: Annotated[float, Range(1, 16)] = 2.0,
    start: Start = "svd",
    iterations: Annotated[int, Range(1, 10_000)] = 60,
    tolerance: Annotated[float, Range(0, 1)] = 0.1,
    shrinkage: Annotated[float, Range(0, 1)] = 1e-6,
    seed: Seed = 42,
) -> None:
    """Learn one dictionary for the matrices of one role in several consecutive layers; each has its own coefficients.

    Minimises Σ_l E||(W_l - S_l D) x||² with the expectation over the inputs of all of the group's layers, as the paper
    does: W is the layers' matrices on top of one another and C the mean of their covariances. Every group keeps the
    same share of its bytes. The rest as for `cospadi`, the final fit of the non-zeros included.

    layers: consecutive layers that share one dictionary; the last group may have fewer. The default is ours.
    ratio: atoms per non-zero, ρ = k/s; the support costs ρ bits a non-zero.
    start: atoms to start from: singular vectors, our default, or columns of the whitened matrix drawn at random, the
        paper's.
    iterations: most rounds of coding and dictionary update; the paper does 60.
    tolerance: stop once five rounds lower the squared error by less than this share (our rule); 0 does all rounds.
    shrinkage: C becomes (1 - a) C + a mean(diag C) I, so that directions never seen stay bounded (ours).
    seed: of the columns drawn.
    """
    if keep == 1:
        return
    seen = InputCovariance()
    for group in calibration.shown(list(groups_of(anatomy, layers)), "cospadi-shared"):
        weights = [matrix.weight.double() for matrix in group]
        covariances = [calibration.statistics.value(key_of(matrix, seen), seen).to(weights[0]) for matrix in group]
        made = learn(
            torch.cat(weights), torch.stack(covariances).mean(0), **size_of(group, keep, ratio).chosen,
            start=start, iterations=iterations, tolerance=tolerance, shrinkage=shrinkage, seed=seed,
        )  # fmt: skip
        bank = Bank(made.dictionary)
        heights = [len(weight) for weight in weights]
        parts = zip(group, made.values.split(heights), made.indices.split(heights), strict=True)
        for matrix, values, indices in parts:
            owns_bank = matrix is group[0]
            put(matrix, SharedSparseDictionary.from_factors(bank, values, indices, group[0].name, owns_bank))


def groups_of(anatomy: Anatomy, layers: int) -> Iterator[list[Matrix]]:
    """Matrices of one role and width in so many consecutive blocks."""
    by_role: dict[tuple[str, int, int], list[Matrix]] = {}
    for matrix in anatomy.matrices():
        place = matrix.role, matrix.block.index // layers, matrix.shape[1]
        by_role.setdefault(place, []).append(matrix)
    yield from by_role.values()


def size_of(group: list[Matrix], keep: float, ratio: float) -> Size:
    """The largest dictionary and coefficients that the group's share pays for."""
    shape = (sum(matrix.shape[0] for matrix in group), group[0].shape[1])
    try:
        return dictionary_size(shape, group[0].module.weight.element_size(), keep, ratio)
    except OutOfReach as error:
        names = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"
        raise OutOfReach(f"{names}: {error}") from None
