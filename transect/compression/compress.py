"""One model, one recipe: calibrate, factorize, allocate, replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy, Matrix
from ..errors import TransectError
from ..statistics import Fisher, Progress
from ..version import __version__
from .allocation import Ranks, RankTable, allocate, needs_measure
from .calibrate import calibrate
from .divergence import Divergence
from .frame import apply_ranks, describe_ranks, factorize, rank_table
from .recipe import Recipe
from .sequential import compress_in_order
from .weighted_svd import Factorization

SEARCH_SEQUENCES = 32  # on which an allocation that runs the model measures it (LEMS)


def compress_anatomy(
    anatomy: Anatomy,
    recipe: Recipe,
    batches: Any = None,
    *,
    matrices: Sequence[Matrix] | None = None,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress the model in place; returns what was kept (see `frame.describe_ranks`).

    batches: calibration data, `transect.data.Batches`; may be None for a recipe that needs none.
    The model is untouched if anything is refused.
    """
    matrices = anatomy.matrices() if matrices is None else list(matrices)
    recipe = recipe.resolved(matrices)
    if recipe.needs_data and batches is None:
        raise TransectError(f"{recipe.method} with {recipe.allocation} allocation needs calibration data: pass data=")
    anatomy.check_finite()
    method = recipe.registered
    # Ranks other than uniform ones come from the dense model's spectra, also when the blocks are compressed in order.
    wanted = list(method.needs)
    if recipe.sequential and recipe.allocation == "uniform":
        wanted = [statistic for statistic in method.needs if statistic.needs != "input"]
    statistics = None
    if wanted:
        statistics = calibrate(
            anatomy, matrices, wanted, batches,
            fisher=fisher, accumulate=accumulate, seed=seed, cache=cache, progress=progress,
        )  # fmt: skip
    factors: dict[str, Factorization] | None = None
    if recipe.sequential and recipe.allocation == "uniform":
        tables = [
            RankTable(m.name, m.block.index, m.shape, torch.zeros(0), m.module.weight.element_size()) for m in matrices
        ]
        ranks = allocate("uniform", tables, recipe.keep, None, {})
    else:
        factors = factorize(matrices, method, recipe.settings, statistics, progress)
        tables = [rank_table(matrix, factors[matrix.name]) for matrix in matrices]
        ranks = choose_ranks(anatomy, matrices, recipe, tables, factors, batches)
    if recipe.sequential or recipe.refit:
        compress_in_order(
            anatomy, matrices, method, recipe.settings, ranks, batches,
            statistics=statistics, factors=None if recipe.sequential else factors, refit=recipe.refit,
            accumulate=accumulate, progress=progress,
        )  # fmt: skip
    else:
        assert factors is not None
        apply_ranks(matrices, factors, ranks)
    outcome = describe_ranks(tables, ranks)
    note_in_record(anatomy, recipe, outcome)
    return outcome


def choose_ranks(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    recipe: Recipe,
    tables: Sequence[RankTable],
    factors: Mapping[str, Factorization],
    batches: Any,
    measure: Divergence | None = None,
) -> Ranks:
    """Ranks for every matrix. `measure`: reuse its measurements; made here if the allocation needs one."""
    if measure is None and needs_measure(recipe.allocation) and recipe.keep < 1:
        measure = Divergence(anatomy, matrices, factors, list(batches.take(SEARCH_SEQUENCES)))
    return allocate(recipe.allocation, tables, recipe.keep, measure, recipe.allocation_settings)


def note_in_record(anatomy: Anatomy, recipe: Recipe, outcome: Mapping[str, Any]) -> None:
    """Write what was done into the structure record's history."""
    entry = {"transect": __version__, "compress": recipe.to_dict(), **outcome}
    anatomy.record.history.append(entry)
