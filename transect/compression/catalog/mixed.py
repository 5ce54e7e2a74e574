"""Mixed: for each matrix the structure that loses least by the byte. Transect's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from ...anatomy import Anatomy
from ...statistics import InputCovariance, OutputGradientCovariance, Statistics, key_of
from ..allocation import rank_of_share
from ..copying import working_copy
from ..divergence import Divergence
from ..factorized import SEARCH_SEQUENCES
from ..options import Metric, Option, choose, dense, dictionary_options, low_rank_options, narrow_mlp_options
from ..refit import refit_to_dense
from ..registry import Calibration, Range, restructuring
from ..weighted_svd import shrink

_INPUTS = InputCovariance()
_GRADIENTS = OutputGradientCovariance(trim=0.125, clip=(0.1, 10.0))
_LOW_RANK_SHARES = tuple(i / 20 for i in range(2, 20))
_DICTIONARY_SHARES = (0.3, 0.45, 0.6, 0.75)
_NARROW_SHARES = tuple(i / 20 for i in range(6, 20))


def check(anatomy: Anatomy, keep: float, **settings: object) -> None:
    for matrix in anatomy.matrices():
        rank_of_share(matrix.name, matrix.shape, keep)


@restructuring("mixed", paper="Transect's own", needs=[_INPUTS, _GRADIENTS], check=check)
def mixed(
    anatomy: Anatomy,
    calibration: Calibration,
    keep: float,
    *,
    structures: Literal["all", "low-rank", "dictionary", "narrow"] = "all",
    refit_outputs: bool = True,
    iterations: Annotated[int, Range(1, 1000)] = 20,
    input_shrinkage: Annotated[float, Range(0, 1)] = 0.1,
    gradient_shrinkage: Annotated[float, Range(0, 1)] = 0.3,
) -> None:
    """Choose a structure and a size for every matrix by the loss increase that its bytes are predicted to save.

    Each matrix may stay dense, become low-rank (KFAC-SVD) or a sparse dictionary (CoSpaDi); each MLP may instead become
    narrower (MoDeGPT's type I). Every option is priced by the two-sided K-FAC metric tr(Γ ΔW A ΔWᵀ), and one integer
    program over the whole model picks the cheapest choice within the budget. With `all`, it is solved for all
    structures and for each alone, the assembled models are measured against the dense one on 32 calibration sequences,
    and the closest wins. Then the operators are refitted, block by block, to the dense model's outputs.

    structures: which may be used; matrices may always stay dense.
    refit_outputs: whether to refit to the dense outputs afterwards.
    iterations: most rounds of dictionary learning for each option.
    input_shrinkage: A becomes (1 - a) A + a mean(diag A) I, as in kfac-svd.
    gradient_shrinkage: likewise for Γ.
    """
    if keep == 1:
        return
    budget = keep * anatomy.matrix_bytes()
    options = [
        option
        for block in calibration.shown(anatomy.blocks, "options")
        for option in _options(
            [
                Metric(
                    matrix,
                    shrink(_value(calibration.statistics, matrix, _INPUTS), input_shrinkage),
                    shrink(_value(calibration.statistics, matrix, _GRADIENTS), gradient_shrinkage),
                )
                for matrix in block.matrices()
            ],
            structures, iterations, calibration.seed,
        )
    ]  # fmt: skip
    chosen = _best(anatomy, calibration, options, budget) if structures == "all" else choose(options, budget)
    reference = working_copy(anatomy) if refit_outputs else None
    _put(anatomy, chosen)
    if reference is not None:
        refit_to_dense(anatomy, reference, list(calibration.batches), calibration.progress)


def _value(statistics: Statistics, matrix: object, statistic: object) -> torch.Tensor:
    return statistics.value(key_of(matrix, statistic), statistic).double()  # type: ignore[arg-type]


def _options(metrics: Sequence[Metric], structures: str, iterations: int, seed: int) -> list[Option]:
    """All options of one block's matrices."""
    found = [dense(metric) for metric in metrics]
    for metric in metrics:
        if structures in ("all", "low-rank"):
            found += low_rank_options(metric, _LOW_RANK_SHARES)
        if structures in ("all", "dictionary"):
            found += dictionary_options(metric, _DICTIONARY_SHARES, iterations, seed)
    mlp = [metric for metric in metrics if metric.matrix.role in ("gate", "up", "down")]
    if mlp and structures in ("all", "narrow"):
        found += narrow_mlp_options(mlp, _NARROW_SHARES, ridge=1e-2)
    return found


def _best(anatomy: Anatomy, calibration: Calibration, options: list[Option], budget: float) -> list[Option]:
    """The choice whose model is closest to the dense one, of all structures together and each alone."""
    measure = Divergence(anatomy, [], {}, list(calibration.batches.take(SEARCH_SEQUENCES)))
    best: tuple[float, list[Option]] | None = None
    for structures in (("low-rank", "dictionary", "narrow"), ("low-rank",), ("dictionary",), ("low-rank", "narrow")):
        chosen = choose([option for option in options if option.structure in ("dense", *structures)], budget)
        copy = working_copy(anatomy)
        _put(copy, chosen)
        distance = measure.of(copy.model)
        if best is None or distance < best[0]:
            best = distance, chosen
    assert best is not None
    return best[1]


def _put(anatomy: Anatomy, chosen: Sequence[Option]) -> None:
    blocks = anatomy.blocks
    for option in chosen:
        option.put(blocks[int(option.covers[0].split(".")[1])])
