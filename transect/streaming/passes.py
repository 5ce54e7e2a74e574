"""The passes over a streamed model: forward for input statistics, backward for gradients, both one block at a time.

Every block's sums go to disk when the block is done, together with what enters the next one, so that an interrupted
run goes on at that block. In memory are one block, its statistics, and the residual stream of the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..forward import backpropagate, computing_wide, task_of
from ..forward.blocks import Feed, put_out, run_block
from ..statistics import Fisher, Progress, Recorder, Statistic, Statistics
from ..statistics.collect import loss_for_gradients
from .source import StreamedModel
from .workspace import Workspace


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
    done = work.done("forward")
    if done is None:
        work.write("hidden", 0, [item.hidden for item in feeds])
        work.advance("forward", done := 0)
    for block in _shown(blocks, "statistics", progress):
        i = block.index
        if i < done:
            continue
        for item, hidden in zip(feeds, work.read("hidden", i), strict=True):
            item.hidden = hidden.to(source.device)
        with source.block(i) as module, computing_wide(module):
            store = Statistics(accumulate)
            with Recorder(block.matrices(), wanted, store, task_of(source.model), [block]) as recorder:
                for item in feeds:
                    recorder.begin_batch(len(item.hidden), item.mask)
                    item.hidden = run_block(module, item.hidden, item.calls[i])
            store.check_finite()
        work.write("hidden", i + 1, [item.hidden for item in feeds])
        work.write_statistics("inputs", i, store)
        work.advance("forward", i + 1, without=[] if keep_hidden else [("hidden", i)])


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
    loss = loss_for_gradients(source.model, fisher, seed)
    done = work.done("backward")
    if done is None:
        gradients = []
        for item, hidden in zip(feeds, work.read("hidden", last), strict=True):
            hidden = hidden.to(source.device).requires_grad_(True)
            with torch.enable_grad(), computing_wide(source.model), put_out(anatomy, hidden):
                backpropagate(source.model, item.batch, loss)
            assert hidden.grad is not None
            gradients.append(hidden.grad)
        work.write("gradient", last, gradients)
        work.advance("backward", done := 0, without=[("hidden", last)])
    for block in _shown(list(reversed(anatomy.blocks)), "gradients", progress):
        i = block.index
        if last - i <= done:
            continue
        arriving, leaving = work.read("gradient", i + 1), []
        inputs = work.read("hidden", i)
        with source.block(i) as module, computing_wide(module):
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
        work.write_statistics("gradients", i, store)
        work.advance("backward", last - i, without=[("hidden", i), ("gradient", i + 1)])


def _shown(items: list, label: str, progress: Progress | None) -> Iterable:
    return progress(items, label) if progress else items
