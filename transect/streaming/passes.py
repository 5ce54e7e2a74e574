"""The passes over a streamed model: forward for input statistics, backward for gradients, both one block at a time.

Every block's sums go to disk when the block is done, together with what enters the next one, so that an interrupted
run goes on at that block. In memory are one block, its statistics, and the residual stream of the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..forward import backpropagate, task_of
from ..forward.blocks import Feed, put_out, run_block
from ..statistics import Fisher, Progress, Recorder, Statistic, Statistics
from ..statistics.collect import loss_for_gradients
from ..store import replacing
from .source import StreamedModel


class Workspace:
    """The folder in which an unfinished run keeps its sums, activations and finished shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str, index: int) -> Path:
        """Of the file of one kind and block."""
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def write(self, kind: str, index: int, tensors: Sequence[Tensor]) -> None:
        """Keep tensors, in order."""
        self.write_named(kind, index, {f"{i:06d}": t.contiguous() for i, t in enumerate(tensors)})

    def write_named(self, kind: str, index: int, tensors: dict[str, Tensor]) -> None:
        """Keep tensors by name; the file appears whole or not at all."""
        with replacing(self.path(kind, index)) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})  # transformers asks for the format

    def read(self, kind: str, index: int) -> list[Tensor]:
        """What `write` kept, in order."""
        return [tensor for _, tensor in sorted(load_file(self.path(kind, index)).items())]

    def remove(self, kind: str, index: int) -> None:
        """Delete what was kept, if it is there."""
        self.path(kind, index).unlink(missing_ok=True)


@torch.no_grad()
def forward_pass(
    source: StreamedModel,
    feeds: Sequence[Feed],
    wanted: Sequence[Statistic],
    work: Workspace,
    accumulate: torch.dtype,
    keep_hidden: bool,
    progress: Progress | None,
) -> None:
    """Input statistics of every block of the dense model. keep_hidden: keep each block's input for `backward_pass`."""
    blocks = source.anatomy.blocks
    if not work.path("inputs", 0).is_file():
        work.write("hidden", 0, [item.hidden for item in feeds])
    for block in _shown(blocks, "statistics", progress):
        i = block.index
        if work.path("inputs", i).is_file():
            continue
        for item, hidden in zip(feeds, work.read("hidden", i), strict=True):
            item.hidden = hidden.to(source.device)
        with source.block(i) as module:
            store = Statistics(accumulate)
            with Recorder(block.matrices(), wanted, store, task_of(source.model), [block]) as recorder:
                for item in feeds:
                    recorder.begin_batch(len(item.hidden), item.mask)
                    item.hidden = run_block(module, item.hidden, item.calls[i])
            store.check_finite()
        work.write("hidden", i + 1, [item.hidden for item in feeds])
        store.save(work.path("inputs", i), {})
        if not keep_hidden:
            work.remove("hidden", i)


def backward_pass(
    source: StreamedModel,
    feeds: Sequence[Feed],
    wanted: Sequence[Statistic],
    work: Workspace,
    accumulate: torch.dtype,
    fisher: Fisher,
    seed: int,
    progress: Progress | None,
) -> None:
    """Gradient statistics of every block, from the last to the first; each block is run again from its kept input."""
    anatomy = source.anatomy
    last = len(anatomy.blocks)
    loss = partial(loss_for_gradients, fisher=fisher, generator=torch.Generator().manual_seed(seed))
    if not work.path("gradient", last).is_file():
        gradients = []
        for item, hidden in zip(feeds, work.read("hidden", last), strict=True):
            hidden = hidden.to(source.device).requires_grad_(True)
            with torch.enable_grad(), put_out(anatomy, hidden):
                backpropagate(source.model, item.batch, loss)
            assert hidden.grad is not None
            gradients.append(hidden.grad)
        work.write("gradient", last, gradients)
        work.remove("hidden", last)
    for block in _shown(list(reversed(anatomy.blocks)), "gradients", progress):
        i = block.index
        if work.path("gradients", i).is_file():
            continue
        arriving, leaving = work.read("gradient", i + 1), []
        inputs = work.read("hidden", i)
        with source.block(i) as module:
            store = Statistics(accumulate)
            with Recorder(block.matrices(), wanted, store, task_of(source.model)) as recorder:
                for item, hidden, gradient in zip(feeds, inputs, arriving, strict=True):
                    hidden = hidden.detach().to(source.device).requires_grad_(True)
                    recorder.begin_batch(len(hidden), item.mask)
                    with torch.enable_grad():
                        run_block(module, hidden, item.calls[i]).backward(gradient.to(source.device))
                    assert hidden.grad is not None
                    leaving.append(hidden.grad)
            store.check_finite()
        work.write("gradient", i, leaving)
        store.save(work.path("gradients", i), {})
        work.remove("hidden", i)
        work.remove("gradient", i + 1)


def _shown(items: list, label: str, progress: Progress | None) -> Iterable:
    return progress(items, label) if progress else items
