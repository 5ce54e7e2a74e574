"""One model, one recipe: calibrate, share out the budget, compress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy, Matrix
from ..anatomy.ties import refuse_shared
from ..errors import TransectError
from ..forward import at_rest
from ..statistics import Fisher, Progress, Statistics
from ..version import __version__
from .all_or_nothing import all_or_nothing
from .allocation import is_ranking
from .allocation.registry import Scores, share_out
from .calibrate import calibrate, check_cache
from .compressors import Compressor, RankCompressor, compressor_of
from .factorized import Factorized
from .frame import check_finite, factorize
from .recipe import Recipe
from .registry import Calibration
from .rounding import round_matrices
from .sequential import compress_in_order


def compress_anatomy(
    anatomy: Anatomy,
    recipe: Recipe,
    batches: Any = None,
    *,
    matrices: Sequence[Matrix] | None = None,
    statistics: Statistics | None = None,
    scores: Scores | None = None,
    prepared: Any = None,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress the model in place; returns what was kept (see `outcome_of`).

    batches: calibration data, `transect.data.Batches`; may be None for a recipe that needs none.
    statistics, scores: of the dense model, where they have been collected already, or are shared with other calls.
    prepared: what the method's `prepare` has made of the dense model with these settings, likewise.
    The model is untouched if anything is refused or fails; until the end, what it was stays in memory.
    Matrices that several places share are refused: what is made of one would not fit the other's inputs, or be stored
    as often as it is used, against the budget.
    """
    matrices = anatomy.matrices() if matrices is None else list(matrices)
    recipe = recipe.resolved(anatomy, matrices)
    refuse_shared(anatomy.model, matrices)
    if recipe.needs_data and batches is None:
        raise TransectError(f"{recipe.method} with {recipe.allocation} allocation needs calibration data: pass data=")
    if cache is not None:
        check_cache(cache)
    anatomy.check_finite()
    roles = {matrix.role for matrix in matrices}
    dense_bytes = anatomy.matrix_bytes(roles)
    # Block by block with uniform shares, only the gradients come from the dense model.
    deferred = recipe.sequential and recipe.allocation == "uniform"
    wanted = [one for one in recipe.needs if not deferred or one.needs in ("gradient", "both")]
    chosen = recipe.registered
    with at_rest(anatomy.model), all_or_nothing(anatomy.model):
        if statistics is None and wanted:
            statistics = calibrate(
                anatomy, matrices, wanted, batches,
                fisher=fisher, accumulate=accumulate, seed=seed, cache=cache, progress=progress,
            )  # fmt: skip
        if chosen.family == "restructuring":
            shared = Calibration(statistics, batches, seed, progress)
            if chosen.prepare is not None and recipe.keep < 1 and prepared is None:
                prepared = chosen.prepare(anatomy, shared, **recipe.settings)
            more = () if chosen.prepare is None else (prepared,)
            chosen.function(anatomy, shared, recipe.structure_keep, *more, **recipe.settings)
            check_finite(anatomy.matrices(), chosen)
        elif recipe.keep < 1:
            compressor = make_compressor(anatomy, matrices, recipe, statistics, batches, progress, scores)
            run_compressor(anatomy, matrices, recipe, compressor, statistics, batches, accumulate, progress)
        if chosen.rounding is not None and recipe.keep < 1 and chosen.family in ("slicing", "restructuring"):
            # Their matrices have other inputs than before.
            matrices, needed = anatomy.matrices(), chosen.rounding.method.needs
            if needed:
                statistics = calibrate(anatomy, matrices, needed, batches, accumulate=accumulate, progress=progress)
            round_matrices(matrices, chosen, statistics)
    outcome = outcome_of(anatomy, roles, dense_bytes)
    note_in_record(anatomy, recipe, outcome)
    return outcome


def make_compressor(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    recipe: Recipe,
    statistics: Statistics | None,
    batches: Any,
    progress: Progress | None,
    scores: Scores | None = None,
) -> Compressor:
    """What compresses each block by this recipe, with the budget shared out by the dense model."""
    chosen = recipe.registered
    if is_ranking(recipe.allocation):
        factors = factorize(matrices, chosen, recipe.settings, statistics, progress)
        ranks = Factorized(anatomy, matrices, factors, batches).ranks(
            recipe.allocation, recipe.structure_keep, recipe.allocation_settings
        )
        return RankCompressor(chosen, recipe.settings, ranks, None if recipe.sequential else factors)
    measured = (scores or Scores(matrices)).of(recipe.allocation, statistics, recipe.allocation_settings)
    shares = share_out(recipe.allocation, matrices, recipe.structure_keep, measured, recipe.allocation_settings)
    return compressor_of(anatomy, matrices, chosen, recipe.settings, shares, recipe.allocation)


def run_compressor(
    anatomy: Anatomy,
    matrices: Sequence[Matrix],
    recipe: Recipe,
    compressor: Compressor,
    statistics: Statistics | None,
    batches: Any,
    accumulate: torch.dtype = torch.float64,
    progress: Progress | None = None,
) -> None:
    """Compress every block; with the data running through the compressed ones if the recipe asks for that."""
    if recipe.sequential or recipe.refit:
        compress_in_order(
            anatomy, matrices, compressor, batches,
            dense=statistics, needs=recipe.registered.collects if recipe.sequential else None, refit=recipe.refit,
            accumulate=accumulate, progress=progress, label=recipe.method,
        )  # fmt: skip
        return
    blocks = anatomy.blocks
    for block in progress(blocks, recipe.method) if progress else blocks:
        compressor(block, [matrix for matrix in matrices if matrix.block.index == block.index], statistics)


def outcome_of(anatomy: Anatomy, roles: Any, dense_bytes: int) -> dict[str, Any]:
    """What is left of the targeted matrices' bytes, for reports and the structure record's history."""
    kept = anatomy.matrix_bytes(roles)
    return {"matrix_bytes": kept, "dense_matrix_bytes": dense_bytes, "kept": kept / dense_bytes}


def note_in_record(anatomy: Anatomy, recipe: Recipe, outcome: dict[str, Any]) -> None:
    """Write what was done into the structure record's history."""
    anatomy.record.history.append({"transect": __version__, "compress": recipe.to_dict(), **outcome})
