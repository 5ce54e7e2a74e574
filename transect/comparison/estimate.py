"""What a comparison will take: memory and disk from shapes, time from one measured block."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy import Anatomy, Block, Matrix
from ..compression import Method, method
from ..compression.copying import working_copy
from ..compression.registry import Size
from ..errors import OutOfReach, TransectError
from ..evaluation.memory import resident_memory
from ..evaluation.quality import REPEATS
from ..evaluation.speed import BUDGET, test_inputs
from ..forward import at_rest, computing_wide, task_of
from ..forward.blocks import feeds_of, put_out, run_block
from ..forward.head import scored
from ..forward.objective import losses_of
from ..statistics import Recorder, Statistic, Statistics, key_of
from ..statistics.collect import collected_at, numbers_behind, parts_for_gradients
from .plan import Plan

_WIDE = 4  # bytes of a number in arithmetic of 32 bits


@dataclass(frozen=True)
class Estimate:
    """memory: bytes at the peak, of the whole process. disk: bytes in the run folder. seconds: None if not measured.

    unknown: methods that change the model as a whole, whose own time is not in `seconds`.
    """

    memory: int
    disk: int
    seconds: float | None = None
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = f"at least about {_gigabytes(self.memory)} of memory and {_gigabytes(self.disk)} of disk"
        if self.seconds is not None:
            told += f", and {_duration(self.seconds)} as this machine is now"
        if self.unknown:
            told += f", without what {', '.join(self.unknown)} will take, which cannot be told from one block"
        return told


def estimate_size(anatomy: Anatomy, plan: Plan, calibration: Any, evaluation: Any, *, streamed: bool) -> Estimate:
    """Memory and disk, from shapes alone.

    Memory is what the process holds now, and on top of it what is there at once: float32 copies of 16-bit weights, the
    statistics (of one block, and the residual streams, if streamed), what a batch leaves behind for the gradients, and
    a copy of the blocks for methods that are not low rank. What a method holds for itself, and what the allocator
    keeps, come on top.
    """
    blocks, matrices = anatomy.blocks, anatomy.matrices(plan.roles)
    of_block = [[matrix for matrix in matrices if matrix.block.index == block.index] for block in blocks]
    statistics = [_statistics_bytes(anatomy, block, mine, plan) for block, mine in zip(blocks, of_block, strict=True)]
    factors = [sum(map(_factor_bytes, mine)) for mine in of_block]
    factorized = [name for name in plan.methods if plan.is_factorized(name)]
    narrow = next(iter(anatomy.model.parameters())).element_size() < _WIDE
    numbers = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    outside = sum(p.numel() for p in anatomy.model.parameters()) - sum(numbers)
    gradients = any(s.needs in ("gradient", "both") for s in plan.needs)
    tokens = [_positions(batches) for batches in (calibration, evaluation)]
    width = anatomy.config_value("hidden")
    batch = max((_positions([one]) for one in calibration), default=0)
    batch = max(batch, *plan.lengths) if plan.lengths else batch
    behind = _WIDE * batch * max(map(numbers_behind, of_block))
    disk = sum(statistics) + len(factorized) * sum(factors)
    memory = resident_memory()
    if streamed:
        streams = tokens[1] + tokens[0] * (2 if gradients else 1)
        block = max(n * _WIDE * (2 if narrow else 1) for n in numbers)
        memory += _WIDE * outside * narrow + block + 2 * max(statistics) + max(factors) + behind
        memory += streams * width * _WIDE
        disk += tokens[0] * width * _WIDE * ((len(blocks) + 1) if gradients else 2)
        return Estimate(memory, disk)
    copied = any(method(name).family != "factorization" for name in plan.methods)
    itemsize = next(iter(anatomy.model.parameters())).element_size()
    memory += _WIDE * (outside + sum(numbers)) * narrow + sum(statistics)
    if gradients:
        part = max((_positions([parts_for_gradients(anatomy, one)[0]]) for one in calibration), default=0)
        behind = _WIDE * part * numbers_behind(matrices)
    memory += max(behind, copied * sum(numbers) * itemsize)
    return Estimate(memory, disk)


def estimate(
    anatomy: Anatomy, plan: Plan, calibration: Any, evaluation: Any, *, source: Any = None
) -> Estimate:  # fmt: skip
    """Memory, disk and time. The first block that has matrices is run on one batch, and one of them compressed.

    source: the streamed model of this anatomy, if its blocks are empty.
    The time of a matrix is taken to grow as m n min(m, n) for factorizations and as m n for the rest.
    """
    size = estimate_size(anatomy, plan, calibration, evaluation, streamed=source is not None)
    matrices, blocks = anatomy.matrices(plan.roles), len(anatomy.blocks)
    block = anatomy.blocks[matrices[0].block.index]
    mine = [matrix for matrix in matrices if matrix.block.index == block.index]
    waiting = [row for row in plan.rows if row.method is not None]
    with at_rest(anatomy.model, frozen=True), source.block(block.index) if source else nullcontext():
        with computing_wide(anatomy.model):
            forward, backward, statistics = _passes(anatomy, block, mine, plan, next(iter(calibration)))
            held_out = next(iter(evaluation))
            scoring = _scoring(anatomy, block, held_out) * _positions(evaluation) / _positions([held_out])
        reading = sum(_reading(anatomy, block, length) for length in plan.lengths)
        methods = {name: _compressing(anatomy, block, mine, plan, name, statistics) for name in plan.methods}
    seconds = (scoring + reading) * (1 + len(plan.beside) + len(waiting))
    if plan.needs:
        seconds += blocks * len(list(calibration)) * (forward + backward)
    unknown = tuple(name for name, each in methods.items() if each is None)
    for name, each in methods.items():
        rows = [row for row in waiting if row.method == name]
        seconds += blocks * (each or 0.0) * (1 if plan.is_factorized(name) else len(rows))
    return Estimate(size.memory, size.disk, seconds, unknown)


def _passes(
    anatomy: Anatomy, block: Block, matrices: Sequence[Matrix], plan: Plan, batch: Any
) -> tuple[float, float, Statistics]:
    """Seconds of a batch's way forward and back through a block, with all statistics; and these."""
    wanted = plan.needs
    gradients = any(s.needs in ("gradient", "both") for s in wanted)
    (feed,) = feeds_of(anatomy, [batch])
    store = Statistics(getattr(torch, plan.accumulate))
    run_block(block.module, feed.hidden, feed.calls[block.index])  # a first run makes what later ones find made
    with Recorder(matrices, wanted, store, task_of(anatomy.model), [block]) as recorder:
        recorder.begin_batch(len(feed.hidden), feed.mask)
        started = time.perf_counter()
        hidden = feed.hidden.detach().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            output = run_block(block.module, hidden, feed.calls[block.index])
        forward = time.perf_counter() - started
        started = time.perf_counter()
        if gradients:
            output.backward(torch.ones_like(output))
        backward = time.perf_counter() - started
    return forward, backward, store


@torch.no_grad()
def _scoring(anatomy: Anatomy, block: Block, batch: Any) -> float:
    """Seconds that a batch of held-out data takes, through as many blocks as there are and the head."""
    (feed,) = feeds_of(anatomy, [batch])
    started = time.perf_counter()
    hidden = run_block(block.module, feed.hidden, feed.calls[block.index])
    through, started = time.perf_counter() - started, time.perf_counter()
    with put_out(anatomy, hidden):
        for logits, labels, _ in scored(anatomy.model, batch):
            losses_of(logits, labels)
    return len(anatomy.blocks) * through + time.perf_counter() - started


@torch.no_grad()
def _reading(anatomy: Anatomy, block: Block, length: int) -> float:
    """Seconds that measuring at a length of prompt takes, through as many blocks as there are."""
    (feed,) = feeds_of(anatomy, [test_inputs(anatomy.model, 1, length)])
    started = time.perf_counter()
    run_block(block.module, feed.hidden, feed.calls[block.index])
    through = len(anatomy.blocks) * (time.perf_counter() - started)
    return through * (2 + min(REPEATS, math.ceil(BUDGET / through)))  # operations, a run to warm up, and those timed


def _compressing(
    anatomy: Anatomy, block: Block, matrices: Sequence[Matrix], plan: Plan, name: str, statistics: Statistics
) -> float | None:
    """Seconds that a method takes for a block at the largest budget; None for one that changes the model as a whole."""
    chosen = method(name)
    settings = chosen.settings(plan.settings.get(name, {}))
    keep = max((keep for keep in plan.keeps if keep < 1), default=0.5)
    if chosen.family == "restructuring":
        return None
    if chosen.family == "slicing":
        copy = working_copy(anatomy, weights=False)
        started = time.perf_counter()
        chosen.function(copy.blocks[block.index], statistics, keep, **settings)
        return time.perf_counter() - started
    matrix = min(matrices, key=lambda one: one.shape[0] * one.shape[1])
    values = [statistics.value(key_of(matrix, s), s).double() for s in chosen.needs]
    size = _size(chosen, matrix, keep, settings)
    started = time.perf_counter()
    chosen.function(matrix.weight.double(), *values, **size.chosen, **settings)
    return (time.perf_counter() - started) * sum(_work(one, chosen) for one in matrices) / _work(matrix, chosen)


def _size(chosen: Method, matrix: Matrix, keep: float, settings: Any) -> Size:
    if chosen.family == "factorization":
        return Size(0, {})
    assert chosen.plan is not None
    itemsize = matrix.module.weight.element_size()
    for share in (keep, 0.99):
        try:
            return chosen.plan(matrix.shape, itemsize, share, **settings)
        except OutOfReach:
            continue
    raise TransectError(f"{chosen.name} reaches none of these budgets for {matrix.name}")


def _work(matrix: Matrix, chosen: Method) -> int:
    m, n = matrix.shape
    return m * n * (min(m, n) if chosen.family == "factorization" else 1)


def _statistics_bytes(anatomy: Anatomy, block: Block, matrices: Sequence[Matrix], plan: Plan) -> int:
    """Of one block's sums."""
    dtype, found = getattr(torch, plan.accumulate), {}

    def add(key: str, statistic: Statistic, shape: tuple[int, int]) -> None:
        sums = statistic.zeros(*shape, dtype, torch.device("meta"))
        found[key, statistic.label] = sum(one.numel() * one.element_size() for one in sums.values())

    for statistic in plan.needs:
        for matrix in matrices:
            if statistic.needs in ("input", "matrix", "gradient", "both") and collected_at(matrix, statistic):
                add(key_of(matrix, statistic), statistic, matrix.shape)
    return sum(found.values())


def _factor_bytes(matrix: Matrix) -> int:
    """Of a matrix's factorization on disk, in float32, up to the rank at which it is as large as the matrix."""
    m, n = matrix.shape
    return _WIDE * ((m * n - 1) // (m + n) * (m + n) + min(m, n))


def _positions(batches: Any) -> int:
    return sum(one["input_ids"].numel() if "input_ids" in one else len(next(iter(one.values()))) for one in batches)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
