"""Distillation one block at a time: each repaired block puts out what the dense model's block does.

Block i is fed with what the repaired blocks before it put out, and its target is the dense model's stream after its own
block i, on the dense model's own inputs. So a block also makes up for what the blocks before it still get wrong (our
choice; SVD-LLM's sequential update does the same). What is lowered is the mean squared error of the stream as a share
of the target's mean square, so that it has one size in every block. In memory are one block's gradients and moments,
and both models' residual streams for all of the data (3 x sequences x positions x width, the targets included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..forward import Batch, at_rest
from ..forward.blocks import Feed, feeds_of, run_block
from ..training import Course, Parameters, Problem, train
from .job import Job
from .trained import trainable, training_mode


@dataclass
class Pair:
    """One batch in both models."""

    ours: Feed
    dense: Feed


Task = tuple[Sequence[Pair | None], Sequence[Tensor | None]]  # batches, and the dense block's output for each


def distill_blocks(anatomy: Anatomy, teacher: Anatomy, changed: Parameters, job: Job) -> list[Course]:
    """Repair block after block, in place; how each block's training went.

    changed: the parameters that may change, by name within the block list.
    """
    learning, judging = ([*_pairs(anatomy, teacher, batches)] for batches in (job.training, job.held_out))
    courses = []
    for index, block in enumerate(anatomy.block_list):
        mine = {k.partition(".")[2]: p for k, p in changed.items() if k.partition(".")[0] == str(index)}
        targets = [_advance(teacher.block_list[index], index, [p and p.dense for p in pairs])
                   for pairs in (learning, judging)]  # fmt: skip
        courses.append(_repair(index, block, mine, (learning, targets[0]), (judging, targets[1]), job))
        for pairs, target in zip((learning, judging), targets, strict=True):
            stream = _advance(block, index, [p and p.ours for p in pairs])
            for pair, ours, dense in zip(pairs, stream, target, strict=True):
                if pair is not None and ours is not None and dense is not None:
                    pair.ours.hidden, pair.dense.hidden = ours, dense
    return courses


def _pairs(anatomy: Anatomy, teacher: Anatomy, batches: Sequence[Batch | None]) -> Iterator[Pair | None]:
    """What enters the first block of both models; None for a batch of which this process has no part."""
    present = [batch for batch in batches if batch is not None]
    found = zip(feeds_of(anatomy, present), feeds_of(teacher, present), strict=True)
    for batch in batches:
        yield None if batch is None else Pair(*next(found))


@torch.no_grad()
def _advance(block: nn.Module, index: int, feeds: Sequence[Feed | None]) -> list[Tensor | None]:
    """The stream after the block for every batch."""
    with at_rest(block):
        return [None if feed is None else run_block(block, feed.hidden, feed.calls[index]) for feed in feeds]


def _repair(index: int, block: nn.Module, mine: Parameters, learning: Task, judging: Task, job: Job) -> Course:
    """Train one block, or take it from the state if it was finished before."""
    finished = job.run.state.read(f"block-{index:05d}")
    if finished is not None:
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(finished[0][name])
        return Course(**finished[1])
    if not mine:  # nothing of the block may change
        return Course()
    scale = _mean(lambda pair, target: _error(torch.zeros_like(target), target, pair.ours.mask), learning, job)

    def loss(item: tuple[Pair, Tensor]) -> tuple[Tensor, int]:
        pair, target = item
        output = run_block(block, pair.ours.hidden, pair.ours.calls[index])
        error, count = _error(output, target, pair.ours.mask)
        return error / max(scale, 1e-12), count

    def measure() -> float:
        with at_rest(block):
            return _mean(lambda *item: loss(item), judging, job)

    items = [None if pair is None else (pair, target) for pair, target in zip(*learning, strict=True)]
    with trainable(block, mine, job.settings) as parameters:
        mode = lambda: training_mode(block)  # noqa: E731
        problem = Problem(f"block {index}", parameters, items, loss, measure, mode, job.tokens)
        course = train(problem, job.run, {"block": index})
    job.run.state.write(f"block-{index:05d}", mine, asdict(course))
    return course


def _error(output: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """||output - target||² / d, summed over the positions that are not padding, and their number."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    error = (output.to(wide) - target.to(device=output.device, dtype=wide)).square().mean(-1)  # (B, T)
    return (error.sum(), error.numel()) if mask is None else (error[mask.bool()].sum(), int(mask.sum()))


@torch.no_grad()
def _mean(error: Callable[[Pair, Tensor], tuple[Tensor, int]], task: Task, job: Job) -> float:
    """The mean error of a position, over all batches and processes."""
    summed = torch.zeros(2, dtype=torch.float64)
    for pair, target in zip(*task, strict=True):
        if pair is not None and target is not None:
            value, count = error(pair, target)
            summed += torch.tensor([value.item(), count], dtype=torch.float64)
    value, count = job.run.machine.total(summed).tolist()
    return value / max(1, count)
