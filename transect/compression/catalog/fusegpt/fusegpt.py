"""FuseGPT: removing blocks and recycling their weights in their neighbours (Pei et al., 2024, arXiv:2411.14507)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import nn

from ....anatomy import Anatomy, Block
from ....anatomy.storage import weight_tensors
from ....errors import OutOfReach, TransectError
from ....forward.blocks import feeds_of
from ....statistics import BlockSimilarity
from ...registry import Calibration, Range, restructuring
from .fusion import FusedGroup, Parts, check_alike, lessons_of, train, window
from .macro_influence import macro_influence

_SIMILARITY = BlockSimilarity()


def check(anatomy: Anatomy, keep: float, **settings: Any) -> None:
    """Refuse to remove every block, a count that does not reach the budget, and blocks that cannot be fused."""
    drop, blocks = settings["drop"], anatomy.blocks
    if not drop and keep == 1:
        return
    if drop >= len(blocks):
        raise TransectError(f"fusegpt: drop={drop} would leave no block; the model has {len(blocks)}")
    anatomy.refuse_dropping_blocks()
    sizes = sorted(_bytes_of(block) for block in blocks)
    if not drop and sizes[-1] > _limit(sum(sizes), keep):
        raise OutOfReach(
            f"keep={keep:g} leaves less than one of the {len(blocks)} blocks; fusegpt removes whole blocks"
        )
    left = sum(sizes[drop:])  # at most; the smallest removed
    if drop and left > _limit(sum(sizes), keep):
        raise TransectError(
            f"fusegpt: removing drop={drop} of {len(blocks)} blocks may keep {left / sum(sizes):.3g} of their bytes, "
            f"more than keep={keep:g}; raise keep (up to 1) or drop, or leave drop at 0 to let keep decide"
        )
    if settings["epochs"]:
        check_alike(blocks)


@restructuring("fusegpt", paper="arXiv:2411.14507", check=check, needs=[_SIMILARITY], data=True)
def fusegpt(
    anatomy: Anatomy,
    calibration: Calibration,
    keep: float,
    *,
    drop: Annotated[int, Range(0, 10_000)] = 0,
    choice: Literal["iterative", "once", "cosine"] = "iterative",
    group: Annotated[int, Range(2, 1_000)] = 8,
    rank: Annotated[int, Range(1, 100_000)] = 128,
    inject: bool = True,
    collapse: Literal["last", "every"] = "last",
    epochs: Annotated[int, Range(0, 10_000)] = 5,
    loss: Literal["kl", "mse"] = "kl",
    fusion_rate: Annotated[float, Range(0, 1)] = 1e-3,
    repair_rate: Annotated[float, Range(0, 1)] = 9.65e-6,
    training_sequences: Annotated[int, Range(1, 1_000_000)] = 128,
    influence_sequences: Annotated[int, Range(1, 1_000_000)] = 32,
) -> None:
    """Remove the blocks that matter least, each recycled as a learned addition to its neighbours' weights.

    One block after another: the one without which the last hidden state turns least is removed; the blocks around it
    receive its weights under a learned mask, and are trained to put out what the group did with it. What a block has
    learned from earlier removals goes on learning whenever it is in a group. In the end everything is written into
    plain weights: the result is an ordinary model with fewer blocks.

    drop: number of blocks to remove; 0 removes as few as bring the matrices to `keep`.
    choice: how blocks are chosen: by Macro Influence measured anew after every removal, by that of the dense model
        (once), or by how little a block turns its own input in the dense model (cosine).
    group: blocks of a group, the removed one included, as in the authors' code; the paper leaves it out of the count.
    rank: of the mask on the removed weights, and of the low-rank change beside it, which is always 128 in that code.
    inject: whether the removed block's weights are injected; without, neighbours learn the low-rank change only.
    collapse: when masks and low-rank changes become plain weights: after the last removal, as in the authors' code, or
        after every one, our addition, which takes less memory; learning then starts anew from there.
    epochs: passes over the training sequences for every removed block; 0 removes blocks without any fusion. The authors
        take 20; 5 is our choice, a quarter of the time on a processor.
    loss: distance to the group's former output: KL divergence between the softmax over the features (ours; the authors'
        code takes it over the sequences of a batch, see `distance`), or squared error.
    fusion_rate: learning rate of the mask and of the biases' coefficients.
    repair_rate: learning rate of the low-rank change, the norms and the biases.
    training_sequences: calibration sequences to train on, the first ones; fewer if fewer are given.
    influence_sequences: calibration sequences to measure Macro Influence on.
    """
    limit = _limit(anatomy.matrix_bytes(), keep)
    generator = torch.Generator().manual_seed(calibration.seed)
    left = list(range(len(anatomy.blocks)))  # numbers in the dense model
    target = len(left) - drop
    scores: dict[int, float] = {}
    learned: dict[nn.Module, Parts] = {}
    while len(left) > target if drop else anatomy.matrix_bytes() > limit:
        if not scores or choice == "iterative":
            measured = _scores(anatomy, calibration, choice, influence_sequences)
            scores = dict(zip(left, measured, strict=True))
        number = min(left, key=lambda block: scores[block])
        removed, fused = left.index(number), None
        if epochs:
            blocks, (first, size) = anatomy.blocks, window(removed, len(left), group)
            feeds = feeds_of(anatomy, calibration.batches.take(training_sequences))
            lessons = lessons_of(feeds, blocks, first, removed, size)
            receivers = [block for block in blocks[first : first + size] if block.index != removed]
            if collapse == "every":
                learned = {}
            fused = FusedGroup(receivers, blocks[removed], rank, generator, inject, learned)
            train(
                fused, lessons, epochs, loss, fusion_rate, repair_rate,
                calibration.ticked(epochs, f"fusegpt: fusing block {number}"),
            )  # fmt: skip
        anatomy.drop_block(removed)
        if fused is not None:
            fused.collapse()
        left.remove(number)


def _scores(anatomy: Anatomy, calibration: Calibration, choice: str, sequences: int) -> list[float]:
    """How much every block matters, by the chosen measure."""
    if choice == "cosine":
        return [
            1 - float(calibration.statistics.value(f"blocks.{block.index}", _SIMILARITY)) for block in anatomy.blocks
        ]
    taken = calibration.batches.take(sequences)
    return macro_influence(anatomy, calibration.shown(taken, "fusegpt: influence")).tolist()


def _bytes_of(block: Block) -> int:
    """Bytes of a block's matrices, a tensor that serves several counted once."""
    tensors = {id(tensor): tensor for matrix in block.matrices() for tensor in weight_tensors(matrix.module)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _limit(whole: int, keep: float) -> float:
    """Bytes that may stay; a share such as 2/3 is not exact, and must not cost a block."""
    return keep * whole * (1 + 1e-9)
