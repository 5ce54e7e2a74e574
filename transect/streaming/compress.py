"""`--stream`: read, calibrate, compress and write one block at a time, straight from and to safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..anatomy import Block, StructureRecord
from ..checkpoint import check_output, placed, replay, write_description
from ..compression import Factorization, Recipe
from ..compression.allocation import allocate_ranks, allocation_named, is_ranking, needs_measure, share_out
from ..compression.allocation.registry import scores_of
from ..compression.compress import note_in_record, outcome_of
from ..compression.compressors import Compressor, RankCompressor, compressor_of
from ..compression.frame import factorize_matrix, rank_table
from ..compression.sequential import block_statistics
from ..errors import TransectError
from ..forward.blocks import Feed, feeds_of, run_block
from ..statistics import Fisher, Progress, Statistics
from ..store import link
from .passes import Workspace, backward_pass, forward_pass
from .source import StreamedModel


def compress_streamed(
    source: StreamedModel,
    recipe: Recipe,
    batches: Any,
    out: Path,
    tokenizer: Any,
    *,
    overwrite: bool = False,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a streamed model into the folder `out`; returns what was kept.

    Peak memory is that of one block, its statistics, the embedding and head, and the residual stream of the calibration
    data, whatever the number of blocks. What is unfinished lies beside `out`; the same call goes on from it.
    batches: `transect.data.Batches`, or None for a recipe that needs none.
    """
    anatomy = source.anatomy
    recipe = recipe.resolved(anatomy, anatomy.matrices())
    if needs_measure(recipe.allocation) or recipe.refit:
        raise TransectError("--stream never has the whole model in memory: it takes neither ilp allocation nor refit")
    if recipe.registered.family == "restructuring":
        raise TransectError(f"--stream never has the whole model in memory, which {recipe.method} changes as a whole")
    if recipe.needs_data and batches is None:
        raise TransectError(f"{recipe.method} needs calibration data: pass data=")
    check_output(out, overwrite)
    work = Workspace(out.parent / f".{out.name}.streaming")
    _same_run(work, source, recipe, batches, fisher, accumulate, seed)
    dense_bytes = anatomy.matrix_bytes()
    gradients = [s for s in recipe.needs if s.needs in ("gradient", "both")]
    inputs = [s for s in recipe.needs if s not in gradients]
    feeds = feeds_of(anatomy, batches) if recipe.needs else []
    if gradients or (inputs and not (recipe.sequential and recipe.allocation == "uniform")):
        forward_pass(source, feeds, inputs, work, accumulate, bool(gradients), progress)
    if gradients:
        backward_pass(source, feeds, gradients, work, accumulate, fisher, seed, progress)
    compressor = _make_compressor(source, recipe, work, progress)
    if recipe.sequential:
        feeds = feeds_of(anatomy, batches)
    _compress_blocks(source, recipe, compressor, feeds, work, accumulate, progress)
    outcome = outcome_of(anatomy, None, dense_bytes)
    note_in_record(anatomy, recipe, outcome)
    _finish(source, work, out, tokenizer)
    return outcome


def _same_run(work: Workspace, source: StreamedModel, recipe: Recipe, batches: Any, *settings: Any) -> None:
    """Start over if what lies in the workspace is of another model, data or recipe."""
    plan = json.dumps(
        [source.fingerprint, recipe.to_dict(), None if batches is None else batches.fingerprint, *map(str, settings)]
    )
    path = work.folder / "run.json"
    if not path.is_file() or path.read_text() != plan:
        for file in work.folder.iterdir():
            file.unlink()
        path.write_text(plan)


def _statistics(work: Workspace, index: int) -> Statistics:
    """A block's input and gradient statistics from disk."""
    store = Statistics()
    for kind in ("inputs", "gradients"):
        found = Statistics.load(work.path(kind, index), {})
        if found is not None:
            store.merge(found)
    return store


def _make_compressor(source: StreamedModel, recipe: Recipe, work: Workspace, progress: Progress | None) -> Compressor:
    """What compresses each block. Spectra for a ranking, or scores, take one more pass over the blocks."""
    anatomy, chosen = source.anatomy, recipe.registered
    matrices, blocks = anatomy.matrices(), anatomy.blocks
    shown = progress(blocks, recipe.allocation) if progress else blocks
    if is_ranking(recipe.allocation):
        tables = []
        for block in shown:
            if not work.path("factors", block.index).is_file():
                statistics = _statistics(work, block.index)
                with source.block(block.index):
                    made = {m.name: factorize_matrix(m, chosen, recipe.settings, statistics) for m in block.matrices()}
                work.write_named("factors", block.index, _flat(made))
            made = _factors(work, block)
            tables += [rank_table(matrix, made[matrix.name]) for matrix in block.matrices()]
        ranks = allocate_ranks(recipe.allocation, tables, recipe.keep, None, recipe.allocation_settings)
        return RankCompressor(chosen, recipe.settings, ranks)
    scores: dict[str, float] = {}
    if allocation_named(recipe.allocation).plan is not None:
        for block in shown:
            statistics = _statistics(work, block.index)
            with source.block(block.index):
                scores |= scores_of(recipe.allocation, block.matrices(), statistics, recipe.allocation_settings)
    shares = share_out(recipe.allocation, matrices, recipe.keep, scores, recipe.allocation_settings)
    return compressor_of(anatomy, matrices, chosen, recipe.settings, shares, recipe.allocation)


def _flat(factors: dict[str, Factorization]) -> dict[str, Tensor]:
    return {
        f"{name}|{part}": getattr(made, part).contiguous()
        for name, made in factors.items()
        for part in ("left", "singular_values", "right")
    }


def _factors(work: Workspace, block: Block) -> dict[str, Factorization]:
    tensors = load_file(work.path("factors", block.index))
    return {
        m.name: Factorization(*(tensors[f"{m.name}|{part}"] for part in ("left", "singular_values", "right")))
        for m in block.matrices()
    }


@torch.no_grad()
def _compress_blocks(
    source: StreamedModel,
    recipe: Recipe,
    compressor: Compressor,
    feeds: Sequence[Feed],
    work: Workspace,
    accumulate: torch.dtype,
    progress: Progress | None,
) -> None:
    """Write every block's shard. A block whose shard is there is only given its structure again."""
    blocks = source.anatomy.blocks
    for block in progress(blocks, f"{recipe.method}, writing") if progress else blocks:
        i = block.index
        if work.path("shard", i).is_file():
            _restore_structure(source, block, work)
            continue
        if recipe.sequential and i and work.path("compressed", i).is_file():
            for item, hidden in zip(feeds, work.read("compressed", i), strict=True):
                item.hidden = hidden.to(item.hidden.device)
        with source.block(i) as module:
            if recipe.keep < 1:
                matrices, statistics = block.matrices(), _statistics(work, i)
                if recipe.sequential:
                    statistics = block_statistics(
                        block, matrices, recipe.registered.needs, feeds, statistics, accumulate
                    )
                elif work.path("factors", i).is_file():
                    assert isinstance(compressor, RankCompressor)
                    compressor = replace(compressor, factors=_factors(work, block))
                compressor(block, matrices, statistics)
            module.requires_grad_(False)
            if recipe.sequential:
                for item in feeds:
                    item.hidden = run_block(module, item.hidden, item.calls[i])
                work.write("compressed", i + 1, [item.hidden for item in feeds])
                work.remove("compressed", i)
            tensors = {f"{block.path}.{name}": t.contiguous().cpu() for name, t in module.state_dict().items()}
            work.path("structure", i).with_suffix(".json").write_text(json.dumps(_structure(source, block).to_dict()))
            work.write_named("shard", i, tensors)
        for kind in ("inputs", "gradients", "factors"):
            work.remove(kind, i)


def _structure(source: StreamedModel, block: Block) -> StructureRecord:
    """The part of the structure record that is about one block."""
    record, inside = source.anatomy.record, block.path + "."
    found = StructureRecord()
    for part in ("modules", "attributes", "parameters"):
        entries = getattr(record, part).items()
        setattr(found, part, {path: entry for path, entry in entries if path.startswith(inside)})
    return found


def _restore_structure(source: StreamedModel, block: Block, work: Workspace) -> None:
    """Give an empty block the structure that its finished shard has."""
    text = work.path("structure", block.index).with_suffix(".json").read_text()
    found, record = StructureRecord.from_dict(json.loads(text)), source.anatomy.record
    replay(source.model, found)
    for part in ("modules", "attributes", "parameters"):
        getattr(record, part).update(getattr(found, part))


def _finish(source: StreamedModel, work: Workspace, out: Path, tokenizer: Any) -> None:
    """Collect the shards, the rest of the weights and the config in one folder, and give it its name."""
    model = source.model
    count = len(source.anatomy.blocks) + 1
    weight_map, total = {}, 0
    state = model.state_dict()
    outside = {name: state[name].contiguous().cpu() for name in source.outside}
    work.write_named("shard", count - 1, outside)
    with placed(out) as folder:
        write_description(model, folder, state)
        for index in range(count):
            shard = work.path("shard", index)
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            sizes = _sizes(shard)
            weight_map |= dict.fromkeys(sizes, name)
            total += sum(sizes.values())
            link(shard, folder / name)
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for file in work.folder.iterdir():
        file.unlink()
    work.folder.rmdir()


def _sizes(path: Path) -> dict[str, int]:
    """Tensor name -> bytes, from the header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}
