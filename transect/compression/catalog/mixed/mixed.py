"""Mixed: for each matrix the structure that loses least by the byte. Transect's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ....anatomy import Anatomy, Block, Matrix
from ....errors import OutOfReach, TransectError
from ....statistics import InputCovariance, InputMean, OutputGradientCovariance, Statistics, key_of
from ...allocation import rank_of_share
from ...copying import working_copy
from ...dictionary_learning import dictionary_size
from ...divergence import Divergence
from ...factorized import SEARCH_SEQUENCES
from ...registry import ByBlock, Calibration, Range, restructuring
from ...sizes import dense_bytes
from ...weighted_svd import shrink
from .integers import integer_low_rank_options, integer_options, least_integer_bytes
from .options import (
    RATIO,
    Metric,
    MetricOf,
    Option,
    choose,
    dense,
    dictionary_options,
    factorized,
    least_narrow_bytes,
    low_rank_options,
    narrow_mlp_options,
    narrow_query_key_options,
    narrow_value_options,
)
from .refit import refit_to_dense

_INPUTS, _MEAN = InputCovariance(), InputMean()
_GRADIENTS = OutputGradientCovariance(trim=0.125, clip=(0.1, 10.0))
_LOW_RANK_SHARES = tuple(i / 20 for i in range(2, 20))
_DICTIONARY_SHARES = (0.3, 0.45, 0.6, 0.75)
_WIDTH_SHARES = tuple(i / 16 for i in range(4, 16))  # of a head
_NEURON_SHARES = tuple(i / 20 for i in range(6, 20))
_NEAR = 0.15  # dictionaries are tried at sizes that differ so much from the size chosen without them, in shares
_ROUNDING = (0.01, 0.1)  # shrinkages of A (as GPTQ damps it) and of Γ for integers, whose errors point anywhere
_PRICING_ROUNDS = 4  # of dictionary learning: all later ones lower the price by a tenth or two
_HOPELESS = 0.1  # no dictionary loses so much less than low rank of its size
_WORSE = 4.0  # prices are truer than that
_INTEGERS = ("integer", "corrected", "integer low-rank")
_CANDIDATES = (
    (*_INTEGERS, "low-rank", "dictionary", "narrow"), (*_INTEGERS, "low-rank"), _INTEGERS, ("integer", "corrected"),
    ("integer",),
    ("low-rank", "dictionary", "narrow"), ("low-rank",),
)  # fmt: skip


def check(anatomy: Anatomy, keep: float, *, structures: str, **settings: object) -> None:
    """Refuse budgets that the smallest options do not fit."""
    for matrix in anatomy.matrices():
        if structures == "integer":
            continue
        if structures == "dictionary":
            dictionary_size(matrix.shape, matrix.module.weight.element_size(), keep, RATIO)
        else:
            rank_of_share(matrix.name, matrix.shape, keep)
    if structures == "integer":
        whole = anatomy.matrix_bytes()
        least = sum(least_integer_bytes(matrix, min(_LOW_RANK_SHARES)) for matrix in anatomy.matrices())
        if least > keep * whole:
            raise OutOfReach(
                f"keep={keep:g} is too little for integers alone, which take {least / whole:.3f} of the bytes; raise "
                "keep, or allow all structures"
            )
    if structures == "narrow":
        whole = anatomy.matrix_bytes()
        least = sum(least_narrow_bytes(block, _WIDTH_SHARES, _NEURON_SHARES) for block in anatomy.blocks)
        if least > keep * whole:
            raise OutOfReach(
                f"keep={keep:g} is too little for narrower layers alone, which take {least / whole:.3f} of the "
                "bytes; raise keep, or allow all structures"
            )


@dataclass(frozen=True)
class Prices:
    """What a dense model's matrices would cost, for every budget.

    options: all but dictionaries. losses: of each matrix's KFAC-SVD, by rank. metric: of a matrix, as KFAC-SVD has it.
    """

    options: list[Option]
    losses: dict[str, Tensor]
    metric: MetricOf


def price(anatomy: Anatomy, calibration: Calibration, **settings: Any) -> Prices:
    """All options of a dense model but dictionaries. What is put in their place is computed when one is taken."""
    shrinkage = settings["input_shrinkage"], settings["gradient_shrinkage"]
    prices = Prices([], {}, _metric_of(calibration.statistics, *shrinkage))
    for block in calibration.shown(anatomy.blocks, "options"):
        prices.options.extend(block_options(block, calibration.statistics, losses=prices.losses, **settings))
    return prices


def block_options(
    block: Block,
    statistics: Statistics,
    *,
    structures: str,
    input_shrinkage: float,
    gradient_shrinkage: float,
    losses: dict[str, Tensor] | None = None,
    **settings: object,
) -> list[Option]:
    """The options of a block's matrices but dictionaries. losses: takes those of each matrix's KFAC-SVD, by rank."""
    metric, rounding = _metric_of(statistics, input_shrinkage, gradient_shrinkage), _metric_of(statistics, *_ROUNDING)
    metrics = [metric(matrix) for matrix in block.matrices()]
    found = [dense(one) for one in metrics]
    for one in metrics:
        if structures in ("all", "low-rank", "integer"):
            made = factorized(one)
        if structures in ("all", "low-rank"):
            by_rank = made.losses()
            found += low_rank_options(one.matrix, by_rank, metric, _LOW_RANK_SHARES)
            if losses is not None:
                losses[one.matrix.name] = by_rank
        if structures in ("all", "integer"):
            found += integer_options(one.matrix, rounding)
            found += integer_low_rank_options(one.matrix, made, _LOW_RANK_SHARES, metric, rounding)
    if structures in ("all", "narrow"):
        if not block.has_experts:
            found += narrow_mlp_options(metrics, metric, _NEURON_SHARES, ridge=1e-2)
        found += narrow_query_key_options(metrics, _WIDTH_SHARES)
        found += narrow_value_options(metrics, metric, _WIDTH_SHARES)
    return found


def check_streams(*, structures: str, **settings: object) -> None:
    """Integers are chosen by prices alone; for the other structures whole models are measured, or refitted."""
    if structures != "integer":
        raise TransectError(
            f"mixed with structures={structures} measures or refits whole models, which --stream never has in memory; "
            "stream it with --mixed.structures integer (integers, corrected ones and low rank of integers)"
        )


@restructuring(
    "mixed", paper="Transect's own", needs=[_INPUTS, _GRADIENTS, _MEAN], check=check, prepare=price,
    by_block=ByBlock(check_streams, block_options, choose),
)  # fmt: skip
def mixed(
    anatomy: Anatomy,
    calibration: Calibration,
    keep: float,
    prices: Prices,
    *,
    structures: Literal["all", "integer", "low-rank", "dictionary", "narrow"] = "all",
    refit_outputs: bool = True,
    iterations: Annotated[int, Range(1, 1000)] = 20,
    input_shrinkage: Annotated[float, Range(0, 1)] = 0.1,
    gradient_shrinkage: Annotated[float, Range(0, 1)] = 0.3,
) -> None:
    """Choose a structure and a size for every matrix by the loss increase that its bytes are predicted to save.

    Each matrix may stay dense, become integers of 2, 3, 4, 5, 6 or 8 bits in groups of 64, with or without a low-rank
    correction (LQER, EoRA), low-rank (KFAC-SVD) with factors of floating-point numbers or of integers, or a sparse
    dictionary (CoSpaDi). Instead, each MLP, each pair of queries
    and keys, and each pair of values and outputs may become narrower (MoDeGPT). Every option is priced by the two-sided
    K-FAC metric tr(Γ ΔW A ΔWᵀ), and one integer program over the whole model picks the cheapest choice within the
    budget. With `all`, it is solved for all structures and for several choices of them; the assembled models, but for
    those that are predicted to lose over four times as much as another, are measured against the dense one on 32
    calibration sequences, and the closest wins. Then the operators of floating-point numbers are refitted, block by
    block, to the dense model's outputs.

    Integers are rounded by both sides of the metric (`two_sided`), where GPTQ goes by the inputs alone.

    Experts of a mixture do not become narrower, and are not refitted, since they may see other tokens than in the dense
    model. Each is priced as if every token passed it.

    Dictionaries take long to learn. So they are priced after a few rounds, with `all` only near the size that a matrix
    gets without them, and where no integers of that size lose a tenth of what low rank does; those that are chosen are
    learned to the end.

    structures: which may be used; matrices may always stay dense. With `integer` it can be streamed.
    refit_outputs: whether to refit to the dense outputs afterwards.
    iterations: most rounds of dictionary learning.
    input_shrinkage: A becomes (1 - a) A + a mean(diag A) I, as in kfac-svd; 0.01 for integers.
    gradient_shrinkage: likewise for Γ; 0.1 for integers.
    """
    if keep == 1:
        return
    budget = keep * anatomy.matrix_bytes()
    matrices = {matrix.name: matrix for matrix in anatomy.matrices()}

    def dictionaries(name: str, shares: Sequence[float], rounds: int) -> list[Option]:
        metric = prices.metric(matrices[name])
        return list(dictionary_options(metric, shares, min(rounds, iterations), calibration.seed))

    options = list(prices.options)
    for name, losses in prices.losses.items():
        options += low_rank_options(matrices[name], losses, prices.metric, [keep])
    if structures in ("all", "dictionary"):
        grid = _DICTIONARY_SHARES if keep >= _DICTIONARY_SHARES[0] else (keep, *_DICTIONARY_SHARES)
        tried = _near(grid, choose(options, budget), matrices) if structures == "all" else dict.fromkeys(matrices, grid)
        tried = _promising(tried, options, matrices) if structures == "all" else tried
        for name, shares in calibration.shown(list(tried.items()), "dictionaries"):
            options += dictionaries(name, shares, _PRICING_ROUNDS)
    chosen = _best(anatomy, calibration, options, budget) if structures == "all" else choose(options, budget)
    refits = refit_outputs and any(option.structure not in ("dense", *_INTEGERS) for option in chosen)
    reference = working_copy(anatomy) if refits else None
    for option in calibration.shown(chosen, "structures"):
        if option.structure == "dictionary":
            (option,) = dictionaries(option.covers[0], (option.share,), iterations)
        _put(anatomy, [option])
    if reference is not None:
        refit_to_dense(anatomy, reference, list(calibration.batches), calibration.progress)


def _metric_of(statistics: Statistics, inputs: float, gradients: float) -> MetricOf:
    def metric(matrix: Matrix) -> Metric:
        return Metric(
            matrix,
            shrink(_value(statistics, matrix, _INPUTS), inputs),
            shrink(_value(statistics, matrix, _GRADIENTS), gradients),
            _value(statistics, matrix, _MEAN),
        )

    return metric


def _value(statistics: Statistics, matrix: Matrix, statistic: object) -> torch.Tensor:
    return statistics.value(key_of(matrix, statistic), statistic).double()  # type: ignore[arg-type]


def _near(grid: Sequence[float], chosen: Sequence[Option], matrices: dict[str, Matrix]) -> dict[str, tuple[float, ...]]:
    """For each matrix the shares of the grid that are near the one it has in a choice, at least the nearest."""
    found = {}
    for option in chosen:
        if option.structure in _INTEGERS:  # no dictionary of floating-point numbers is as small
            continue
        covered = [matrices[name] for name in option.covers]
        has = option.bytes / sum(dense_bytes(matrix) for matrix in covered)
        nearest = min(grid, key=lambda share: abs(share - has))
        for name in option.covers:
            found[name] = tuple(share for share in grid if share == nearest or abs(share - has) <= _NEAR)
    return found


def _promising(
    tried: dict[str, tuple[float, ...]], options: Sequence[Option], matrices: dict[str, Matrix]
) -> dict[str, tuple[float, ...]]:
    """Without the shares at which a dictionary would have to lose a tenth of what low rank does to be taken."""

    def least(name: str, share: float, structures: tuple[str, ...]) -> float:
        most = share * dense_bytes(matrices[name])
        return min((o.loss for o in by_name[name] if o.structure in structures and o.bytes <= most), default=math.inf)

    by_name: dict[str, list[Option]] = {}
    for option in options:
        if len(option.covers) == 1:
            by_name.setdefault(option.covers[0], []).append(option)
    found = {
        name: tuple(s for s in shares if least(name, s, _INTEGERS) > _HOPELESS * least(name, s, ("low-rank",)))
        for name, shares in tried.items()
    }
    return {name: shares for name, shares in found.items() if shares}


def _best(anatomy: Anatomy, calibration: Calibration, options: list[Option], budget: float) -> list[Option]:
    """The choice whose model is closest to the dense one, of all structures together and of fewer."""
    choices: list[list[Option]] = []
    for structures in _CANDIDATES:
        chosen = choose([option for option in options if option.structure in ("dense", *structures)], budget)
        if chosen not in choices:
            choices.append(chosen)
    predicted = [sum(option.loss for option in chosen) for chosen in choices]
    choices = [each for each, loss in zip(choices, predicted, strict=True) if loss <= _WORSE * min(predicted)]
    if len(choices) == 1:
        return choices[0]
    measure = Divergence(anatomy, [], {}, list(calibration.batches.take(SEARCH_SEQUENCES)))
    distances = []
    for chosen in choices:
        copy = working_copy(anatomy)
        _put(copy, chosen)
        distances.append(measure.of(copy.model))
    return choices[distances.index(min(distances))]


def _put(anatomy: Anatomy, chosen: Sequence[Option]) -> None:
    blocks = anatomy.blocks
    for option in chosen:
        option.put(blocks[int(option.covers[0].split(".")[1])])
