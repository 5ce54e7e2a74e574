"""What a recipe comes down to for the blocks of a streamed model, whose statistics lie on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Block
from ..compression import Factorization, Method, Recipe
from ..compression.allocation import RankTable, allocate_ranks, allocation_named, is_ranking, needs_measure, share_out
from ..compression.allocation.registry import scores_of
from ..compression.compressors import ChoiceCompressor, Compressor, RankCompressor, compressor_of
from ..compression.frame import factorize_matrix, rank_table
from ..compression.sequential import block_statistics
from ..errors import TransectError
from ..forward import computing_wide
from ..forward.blocks import Feed, feeds_of
from ..statistics import Progress, Statistics
from .source import StreamedModel
from .workspace import Workspace

FACTORS = "factors"


def check_streams(recipe: Recipe) -> None:
    """Raise TransectError for what cannot be done with one block in memory at a time."""
    if needs_measure(recipe.allocation) or recipe.refit:
        raise TransectError("--stream never has the whole model in memory: it takes neither ilp allocation nor refit")
    if recipe.registered.family == "restructuring":
        if recipe.registered.by_block is None:
            raise TransectError(
                f"--stream never has the whole model in memory, which {recipe.method} changes as a whole"
            )
        recipe.registered.by_block.check(**recipe.registered.settings(recipe.settings))
    rounding = recipe.registered.rounding
    if rounding is not None and rounding.method.needs and recipe.registered.family == "slicing":
        raise TransectError(
            f"{recipe.method} cannot be streamed, since its rounding goes by the inputs that slicing leaves; compress "
            "in memory, or round to the nearest (+rtn4)"
        )


def feeds_of_source(source: StreamedModel, batches: Any) -> list[Feed]:
    """What enters the first block, for each batch."""
    with computing_wide(source.model):
        return feeds_of(source.anatomy, batches)


def statistics_of(work: Workspace, index: int) -> Statistics:
    """A block's input and gradient statistics from disk."""
    store = Statistics()
    for kind in ("inputs", "gradients"):
        if work.has(kind, index):
            store.merge(work.read_statistics(kind, index))
    return store


def make_compressor(
    source: StreamedModel, recipe: Recipe, work: Workspace, progress: Progress | None
) -> Compressor:  # fmt: skip
    """What compresses each block. Spectra for a ranking, scores, or options take one more pass over the blocks.

    What came of that pass is kept, since what it went by goes block by block when the blocks are compressed.
    """
    if work.done("plan") is None and recipe.registered.by_block is not None:
        work.write_json("plan", 0, choice_of(source, recipe, priced_blocks(source, recipe, work, progress)))
        work.advance("plan", 0)
    elif work.done("plan") is None and is_ranking(recipe.allocation):
        tables = factorize_blocks(source, recipe.registered, recipe.settings, work, FACTORS, progress)
        work.write_json("plan", 0, ranks_of(recipe, tables))
        work.advance("plan", 0)
    elif work.done("plan") is None and allocation_named(recipe.allocation).plan is not None:
        work.write_json("plan", 0, score_blocks(source, recipe, work, progress))
        work.advance("plan", 0)
    planned = {} if work.done("plan") is None else work.read_json("plan", 0)
    return planned_compressor(source, recipe, planned)


def planned_compressor(source: StreamedModel, recipe: Recipe, planned: dict[str, Any]) -> Compressor:
    """planned: ranks by matrix name, where the allocation is a ranking; numbers of options by block, for a method that
    chooses among them; otherwise scores, if it goes by any.
    """
    if recipe.registered.by_block is not None:
        numbers = {int(index): of_block for index, of_block in planned.items()}
        return ChoiceCompressor(recipe.registered, recipe.settings, numbers)
    if is_ranking(recipe.allocation):
        return RankCompressor(recipe.registered, recipe.settings, planned)
    anatomy = source.anatomy
    matrices = anatomy.matrices()
    shares = share_out(recipe.allocation, matrices, recipe.structure_keep, planned, recipe.allocation_settings)
    return compressor_of(anatomy, matrices, recipe.registered, recipe.settings, shares, recipe.allocation)


def compress_block(
    block: Block,
    recipe: Recipe,
    compressor: Compressor,
    feeds: Sequence[Feed],
    work: Workspace,
    accumulate: torch.dtype,
    kind: str = FACTORS,
) -> None:
    """Compress a block that has its weights, by what lies on disk. kind: of its factors, if it has been factorized.

    feeds: what enters it, for a sequential recipe.
    """
    matrices, statistics = block.matrices(), statistics_of(work, block.index)
    if recipe.sequential:
        statistics = block_statistics(block, matrices, recipe.registered.collects, feeds, statistics, accumulate)
    elif work.has(kind, block.index):
        assert isinstance(compressor, RankCompressor)
        compressor = replace(compressor, factors=_factors(work, kind, block))
    compressor(block, matrices, statistics)


def factorize_blocks(
    source: StreamedModel,
    method: Method,
    settings: Any,
    work: Workspace,
    kind: str,
    progress: Progress | None,
) -> list[RankTable]:
    """Factorize all matrices, on disk as of that kind; returned is what their ranks cost."""
    tables, done = [], work.done(kind) or 0
    for block in shown(source, method.name, progress):
        if block.index >= done:
            statistics = statistics_of(work, block.index)
            with source.block(block.index):
                made = {
                    matrix.name: factorize_matrix(matrix, method, settings, statistics) for matrix in block.matrices()
                }
            work.write_named(kind, block.index, _flat(made))
            work.advance(kind, block.index + 1)
        made = _factors(work, kind, block)
        tables += [rank_table(matrix, made[matrix.name]) for matrix in block.matrices()]
    return tables


def ranks_of(recipe: Recipe, tables: Sequence[RankTable]) -> dict[str, int | None]:
    """Each matrix's rank, by a ranking."""
    found = allocate_ranks(recipe.allocation, tables, recipe.structure_keep, None, recipe.allocation_settings)
    return dict(found)


def priced_blocks(
    source: StreamedModel, recipe: Recipe, work: Workspace, progress: Progress | None
) -> list[list[Any]]:  # fmt: skip
    """Each block's options, what they would put in place left away: it is made again when one is taken."""
    by_block, found = recipe.registered.by_block, []
    assert by_block is not None
    for block in shown(source, f"{recipe.method}, options", progress):
        statistics = statistics_of(work, block.index)
        with source.block(block.index):
            found.append([replace(one, put=_not_put) for one in by_block.options(block, statistics, **recipe.settings)])
    return found


def _not_put(block: Block) -> None:
    raise AssertionError("this option was only priced")


def choice_of(source: StreamedModel, recipe: Recipe, options: Sequence[Sequence[Any]]) -> dict[str, list[int]]:
    """The numbers of the options that are taken, by block index. options: of each block."""
    by_block = recipe.registered.by_block
    assert by_block is not None
    every = [one for of_block in options for one in of_block]
    taken = set(map(id, by_block.choose(every, recipe.keep * source.anatomy.matrix_bytes())))
    return {str(i): [n for n, one in enumerate(of_block) if id(one) in taken] for i, of_block in enumerate(options)}


def score_blocks(
    source: StreamedModel, recipe: Recipe, work: Workspace, progress: Progress | None
) -> dict[str, float]:  # fmt: skip
    """A sharing's scores of all matrices."""
    scores: dict[str, float] = {}
    for block in shown(source, recipe.allocation, progress):
        statistics = statistics_of(work, block.index)
        with source.block(block.index):
            scores |= scores_of(recipe.allocation, block.matrices(), statistics, recipe.allocation_settings)
    return scores


def shown(source: StreamedModel, label: str, progress: Progress | None) -> Iterable[Block]:
    """The blocks, with a progress bar if there is one."""
    blocks = source.anatomy.blocks
    return progress(blocks, label) if progress else blocks


def _flat(factors: dict[str, Factorization]) -> dict[str, Tensor]:
    return {
        f"{name}|{part}": getattr(made, part).contiguous()
        for name, made in factors.items()
        for part in ("left", "singular_values", "right")
    }


def _factors(work: Workspace, kind: str, block: Block) -> dict[str, Factorization]:
    tensors = work.read_named(kind, block.index)
    return {
        m.name: Factorization(*(tensors[f"{m.name}|{part}"] for part in ("left", "singular_values", "right")))
        for m in block.matrices()
    }
