"""`--stream`: read, calibrate, compress and write one block at a time, straight from and to safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..anatomy import Block
from ..checkpoint import check_output, placed, write_description
from ..compression import Factorization, Recipe
from ..compression.allocation import Ranks, RankTable, allocate, needs_measure
from ..compression.blockwise import Feed, feeds_of, run_block
from ..compression.compress import note_in_record
from ..compression.frame import apply_ranks, describe_ranks, factorize_matrix, rank_table
from ..compression.sequential import block_statistics
from ..errors import TransectError
from ..operators import LowRank
from ..statistics import Fisher, Progress, Statistics
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
    recipe = recipe.resolved(anatomy.matrices())
    if needs_measure(recipe.allocation) or recipe.refit:
        raise TransectError("--stream never has the whole model in memory: it takes neither ilp allocation nor refit")
    if recipe.needs_data and batches is None:
        raise TransectError(f"{recipe.method} needs calibration data: pass data=")
    check_output(out, overwrite)
    work = Workspace(out.parent / f".{out.name}.streaming")
    _same_run(work, source, recipe, batches, fisher, accumulate, seed)
    needs = recipe.registered.needs
    inputs = [s for s in needs if s.needs == "input"]
    gradients = [s for s in needs if s.needs in ("gradient", "both")]
    feeds = feeds_of(anatomy, batches) if needs else []
    if gradients or (inputs and not (recipe.sequential and recipe.allocation == "uniform")):
        forward_pass(source, feeds, inputs, work, accumulate, bool(gradients), progress)
    if gradients:
        backward_pass(source, feeds, gradients, work, accumulate, fisher, seed, progress)
    tables, ranks = _choose_ranks(source, recipe, work, progress)
    if recipe.sequential:
        feeds = feeds_of(anatomy, batches)
    _compress_blocks(source, recipe, ranks, feeds, work, accumulate, progress)
    outcome = describe_ranks(tables, ranks)
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


def _choose_ranks(
    source: StreamedModel, recipe: Recipe, work: Workspace, progress: Progress | None
) -> tuple[list[RankTable], Ranks]:
    """Uniform ranks follow from the shapes. Others need every spectrum, so each block is factorized first, to disk."""
    anatomy = source.anatomy
    itemsize = next(source.model.parameters()).element_size()
    if recipe.allocation == "uniform":
        none = torch.zeros(0)
        tables = [RankTable(m.name, m.block.index, m.shape, none, itemsize) for m in anatomy.matrices()]
        return tables, allocate("uniform", tables, recipe.keep, None, {})
    tables = []
    for block in progress(anatomy.blocks, recipe.method) if progress else anatomy.blocks:
        if not work.path("factors", block.index).is_file():
            statistics = _statistics(work, block.index)
            with source.block(block.index):
                made = {
                    m.name: factorize_matrix(m, recipe.registered, recipe.settings, statistics)
                    for m in block.matrices()
                }
            work.write_named("factors", block.index, _flat(made))
        made = _factors(work, block)
        tables += [rank_table(matrix, made[matrix.name]) for matrix in block.matrices()]
    return tables, allocate(recipe.allocation, tables, recipe.keep, None, recipe.allocation_settings)


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
    ranks: Ranks,
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
            _restore_structure(block, ranks)
            continue
        if recipe.sequential and i and work.path("compressed", i).is_file():
            for item, hidden in zip(feeds, work.read("compressed", i), strict=True):
                item.hidden = hidden.to(item.hidden.device)
        with source.block(i) as module:
            if work.path("factors", i).is_file() and not recipe.sequential:
                made = _factors(work, block)
            else:
                statistics = _statistics(work, i)
                if recipe.sequential:
                    statistics = block_statistics(
                        block, block.matrices(), recipe.registered.needs, feeds, statistics, accumulate
                    )
                made = {
                    m.name: factorize_matrix(m, recipe.registered, recipe.settings, statistics)
                    for m in block.matrices()
                }
            apply_ranks(block.matrices(), made, ranks)
            module.requires_grad_(False)
            if recipe.sequential:
                for item in feeds:
                    item.hidden = run_block(module, item.hidden, item.calls[i])
                work.write("compressed", i + 1, [item.hidden for item in feeds])
                work.remove("compressed", i)
            tensors = {f"{block.path}.{name}": t.contiguous().cpu() for name, t in module.state_dict().items()}
            work.write_named("shard", i, tensors)
        for kind in ("inputs", "gradients", "factors"):
            work.remove(kind, i)


def _restore_structure(block: Block, ranks: Ranks) -> None:
    """Give an empty block the structure that its finished shard has."""
    with torch.device("meta"):
        for matrix in block.matrices():
            rank = ranks[matrix.name]
            if rank is not None:
                bias = matrix.bias is not None
                matrix.replace(LowRank(matrix.shape[1], matrix.shape[0], rank, bias).to(matrix.module.weight.dtype))


def _finish(source: StreamedModel, work: Workspace, out: Path, tokenizer: Any) -> None:
    """Collect the shards, the rest of the weights and the config in one folder, and give it its name."""
    model = source.model
    count = len(source.anatomy.blocks) + 1
    weight_map, total = {}, 0
    outside = {name: model.get_parameter(name).contiguous().cpu() for name in source.outside}
    work.write_named("shard", count - 1, outside)
    with placed(out) as folder:
        write_description(model, folder, model.state_dict())
        for index in range(count):
            shard = work.path("shard", index)
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            sizes = _sizes(shard)
            weight_map |= dict.fromkeys(sizes, name)
            total += sum(sizes.values())
            (folder / name).hardlink_to(shard)
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
