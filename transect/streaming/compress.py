"""`--stream`: read, calibrate, compress and write one block at a time, straight from and to safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Block, StructureRecord
from ..checkpoint import check_output, packed_tensors, placed, replay, structure_of, write_description
from ..checkpoint.place import LAST
from ..compression import Recipe
from ..compression.compress import note_in_record, outcome_of
from ..compression.compressors import Compressor
from ..errors import TransectError
from ..forward import computing_wide
from ..forward.blocks import Feed, run_block
from ..statistics import Fisher, Progress
from ..store import alone, finish_exchange, link, sweep, write_text
from ..version import __version__
from .passes import backward_pass, forward_pass
from .plan import check_streams, compress_block, feeds_of_source, make_compressor, shown
from .source import StreamedModel
from .workspace import Workspace


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
    check_streams(recipe)
    if recipe.needs_data and batches is None:
        raise TransectError(f"{recipe.method} needs calibration data: pass data=")
    out = out.expanduser().resolve()
    with alone(out):
        work = Workspace(out.parent / f".{out.name}.streaming", _run(source, recipe, batches, fisher, accumulate, seed))
        outcome = _finished(work, out, len(anatomy.blocks) + 1)
        if outcome is not None:
            return outcome
        check_output(out, overwrite)
        work.begin()
        dense_bytes = anatomy.matrix_bytes()
        gradients = [s for s in recipe.needs if s.needs in ("gradient", "both")]
        inputs = [s for s in recipe.needs if s not in gradients]
        feeds = feeds_of_source(source, batches) if recipe.needs else []
        if gradients or (inputs and not (recipe.sequential and recipe.allocation == "uniform")):
            forward_pass(source, feeds, inputs, work, accumulate, bool(gradients), progress)
        if gradients:
            backward_pass(source, feeds, gradients, work, accumulate, fisher, seed, progress)
        compressor = make_compressor(source, recipe, work, progress)
        if recipe.sequential:
            feeds = feeds_of_source(source, batches)
        _compress_blocks(source, recipe, compressor, feeds, work, accumulate, progress)
        outcome = outcome_of(anatomy, None, dense_bytes)
        note_in_record(anatomy, recipe, outcome)
        _finish(source, work, out, tokenizer, outcome)
        return outcome


def _run(source: StreamedModel, recipe: Recipe, batches: Any, *settings: Any) -> str:
    """All that decides the numbers of a run."""
    data = None if batches is None else batches.fingerprint
    model = [source.fingerprint, repr(source.anatomy.architecture)]
    described = json.dumps([__version__, model, recipe.to_dict(), data, *map(str, settings)])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _finished(work: Workspace, out: Path, count: int) -> dict[str, Any] | None:
    """What was kept, if an earlier run ended only when its result was in place; then what it has left goes.

    count: of the result's files. They are the run's if the workspace has the same files, or once they are in place, if
    they say so and are whole.
    """
    work.tidy()
    if not work.look() or work.done("shards") is None:
        return None
    if out.is_dir():
        finish_exchange(out, LAST)
    shards = _shards(work, count)
    placed_ones = [out / _shard_name(index, count) for index in range(count)]
    if not (out / LAST).is_file() or not all(path.is_file() for path in placed_ones):
        return None
    if work.done("placed") is None:
        there = all(a.is_file() and a.samefile(b) for a, b in zip(shards, placed_ones, strict=True))
    else:
        there = all(work.wrote(path) for path in placed_ones)
    if not there:
        return None
    outcome = work.note
    sweep(out)
    work.remove()
    return outcome


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
    last, done = len(source.anatomy.blocks) - 1, work.done("compressed") or 0
    for block in shown(source, f"{recipe.method}, writing", progress):
        i = block.index
        if i < done:
            _restore_structure(source, block, work)
            continue
        if recipe.sequential and 0 < i == done:
            for item, hidden in zip(feeds, work.read("compressed", i), strict=True):
                item.hidden = hidden.to(item.hidden.device)
        with source.block(i) as module:
            if recipe.keep < 1:
                compress_block(block, recipe, compressor, feeds, work, accumulate)
            module.requires_grad_(False)
            if recipe.sequential and i < last:
                with computing_wide(module):
                    for item in feeds:
                        item.hidden = run_block(module, item.hidden, item.calls[i])
                work.write("compressed", i + 1, [item.hidden for item in feeds])
            work.write_json("structure", i, _structure(source, block).to_dict())
            work.write_named("shard", i, {f"{block.path}.{name}": t for name, t in module.state_dict().items()})
        used = ("inputs", "gradients", "factors", "compressed")
        work.advance("compressed", i + 1, without=[(kind, i) for kind in used])


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
    found, record = StructureRecord.from_dict(work.read_json("structure", block.index)), source.anatomy.record
    replay(source.model, found)
    for part in ("modules", "attributes", "parameters"):
        getattr(record, part).update(getattr(found, part))


def _finish(source: StreamedModel, work: Workspace, out: Path, tokenizer: Any, outcome: dict[str, Any]) -> None:
    """Collect the shards, the rest of the weights and the config in one folder, and give it its name."""
    model = source.model
    count = len(source.anatomy.blocks) + 1
    weight_map, total = {}, 0
    state = model.state_dict()
    structure = structure_of(model, state)
    if work.done("shards") is None:
        work.write_named("shard", count - 1, {name: state[name] for name in source.outside})
        if structure.packed is not None:
            for index in range(count):
                tensors = packed_tensors(source.anatomy.record, work.read_named("shard", index))
                work.write_named("packed", index, tensors)
        work.advance("shards", count, note=outcome)
    with placed(out) as folder:
        write_description(model, folder, structure)
        for index, shard in enumerate(_shards(work, count)):
            name = _shard_name(index, count)
            sizes = _sizes(shard)
            weight_map |= dict.fromkeys(sizes, name)
            total += sum(sizes.values())
            link(shard, folder / name)
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index_file, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    work.advance("placed", count)
    work.remove()


def _shards(work: Workspace, count: int) -> list[Path]:
    """The result's files, in the form in which they are to be read."""
    kind = "packed" if work.has("packed", 0) else "shard"
    return [work.path(kind, index) for index in range(count)]


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _sizes(path: Path) -> dict[str, int]:
    """Tensor name -> bytes, from the header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}
