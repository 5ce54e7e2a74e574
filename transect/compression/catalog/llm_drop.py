"""LLM-Drop: attention sublayers, MLP sublayers or blocks that hardly turn the residual stream go as a whole.

He et al., "What Matters in Transformers? Not All Attention is Needed", 2024, arXiv:2406.15786.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...anatomy.storage import weight_tensors
from ...errors import OutOfReach, TransectError
from ...forward.blocks import feeds_of, run_block
from ...statistics import BlockSimilarity, Statistics, SublayerSimilarity, collect
from ..registry import Calibration, Range, restructuring

_SUBLAYERS, _BLOCKS = SublayerSimilarity(), BlockSimilarity()
_KINDS = ("attention", "mlp")
Sublayer = tuple[int, str]  # block index, "attention" or "mlp"
Unit = tuple[Sublayer, ...]  # what goes together: one sublayer, or both of a block


def units_of(anatomy: Anatomy, variant: str) -> list[Unit]:
    """What a variant chooses from, in the model's order; sublayers that were dropped before are not among it."""
    if variant in ("block", "consecutive"):
        return [tuple((block.index, kind) for kind in _KINDS) for block in anatomy.blocks]
    wanted = _KINDS if variant == "joint" else (variant,)
    return [((block.index, kind),) for block in anatomy.blocks for kind in wanted if getattr(block, kind) is not None]


class Sizes:
    """What the matrices of every sublayer store, so that the bytes without some of them are known beforehand."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._stored: dict[Sublayer, dict[int, Tensor]] = {}
        for matrix in anatomy.matrices():
            kind = "attention" if matrix.role in ("q", "k", "v", "o") else "mlp"
            tensors = self._stored.setdefault((matrix.block.index, kind), {})
            tensors.update({id(tensor): tensor for tensor in weight_tensors(matrix.module)})

    def without(self, gone: Collection[Sublayer]) -> int:
        """Bytes of all matrices but those of these sublayers; a tensor that several share counts once."""
        kept = (tensors for sublayer, tensors in self._stored.items() if sublayer not in gone)
        stored = {key: tensor for tensors in kept for key, tensor in tensors.items()}.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)


def check(anatomy: Anatomy, keep: float, *, variant: str, iterative: bool, drop: int) -> None:
    """Refuse what the model cannot lose, a count that leaves nothing, and a budget that no choice reaches."""
    units = units_of(anatomy, variant)
    if iterative and variant == "consecutive":
        raise TransectError(
            "llm-drop: consecutive blocks are chosen all at once, so they cannot be dropped iteratively"
        )
    if drop and keep < 1:
        raise TransectError(
            f"llm-drop: drop={drop} and keep={keep:g} both say how much goes; give drop with keep=1, or keep alone"
        )
    if not drop and keep == 1:
        return
    if variant in ("block", "consecutive"):
        anatomy.refuse_dropping_blocks()
    else:
        for block in anatomy.blocks:
            block.refuse_dropping_sublayers()
    if drop >= len(units):
        raise TransectError(
            f"llm-drop: drop={drop} would leave none of the {len(units)} units that variant={variant} chooses from; "
            "at least one must stay"
        )
    sizes = Sizes(anatomy)
    whole = sizes.without(())
    everything = {sublayer for unit in units for sublayer in unit}
    # Whichever unit is the last: the order is known only after calibration.
    least = max((sizes.without(everything.difference(unit)) for unit in units), default=whole)
    if not drop and least > keep * whole:
        raise OutOfReach(
            f"llm-drop with variant={variant} can drop all units but one, which keeps {least / whole:.4g} of the "
            f"matrices' bytes, not {keep:.4g}: it needs keep >= {math.ceil(least / whole * 1e4) / 1e4:.4g}"
        )


@restructuring("llm-drop", paper="arXiv:2406.15786", check=check, needs=[_SUBLAYERS, _BLOCKS])
def llm_drop(
    anatomy: Anatomy,
    calibration: Calibration,
    keep: float,
    *,
    variant: Literal["joint", "attention", "mlp", "block", "consecutive"] = "joint",
    iterative: bool = False,
    drop: Annotated[int, Range(0, 100_000)] = 0,
) -> None:
    """Drop the attention sublayers, MLP sublayers or blocks that turn the residual stream least.

    A unit's similarity is the mean over positions of cos(x, y), where x enters it on the residual stream and
    y = x + what it adds. The units with the highest similarity go: the fewest that bring the matrices' bytes down to
    `keep`, or `drop` of them. Dropping more drops the same ones and others. Of equal ones the later block goes first,
    and its attention before its MLP (our choice). A block that has lost both sublayers goes as a whole, so dropped
    blocks leave an ordinary model with fewer layers; a dropped sublayer leaves its norm behind, whose output nothing
    reads. There is no key/value cache for a dropped attention.

    variant: what is chosen from: all sublayers in one ranking ("joint"), attention sublayers, MLP sublayers, single
        blocks, or one span of adjacent blocks ("consecutive") whose input and output are most similar. Joint reaches
        any budget.
    iterative: drop one, measure the reduced model on the calibration data, drop the next; the default measures once.
    drop: how many units to drop, with keep=1; 0 drops what `keep` asks for.
    """
    if not drop and keep == 1:
        return
    budget = keep * anatomy.matrix_bytes()
    if variant == "consecutive":
        remove(anatomy, _span(anatomy, calibration, budget, drop))
    elif iterative:
        _drop_one_by_one(anatomy, calibration, budget, variant, drop)
    else:
        order = ranked(units_of(anatomy, variant), calibration.statistics)
        sizes = Sizes(anatomy)
        count = drop or next(n for n in range(len(order)) if sizes.without(sum(order[:n], ())) <= budget)
        remove(anatomy, sum(order[:count], ()))


def similarity(unit: Unit, statistics: Statistics) -> float:
    """Mean cosine between what enters a unit and what leaves it."""
    block, kind = unit[0]
    if len(unit) == 2:
        return float(statistics.value(f"blocks.{block}", _BLOCKS))
    return float(statistics.value(f"blocks.{block}", _SUBLAYERS)[_KINDS.index(kind)])


def ranked(units: list[Unit], statistics: Statistics) -> list[Unit]:
    """The units in the order in which they go."""
    return sorted(units, key=lambda unit: (-similarity(unit, statistics), -unit[0][0], unit[0][1]))


def _drop_one_by_one(anatomy: Anatomy, calibration: Calibration, budget: float, variant: str, drop: int) -> None:
    dropped = 0
    while dropped < drop if drop else anatomy.matrix_bytes() > budget:
        wanted = [_BLOCKS if variant == "block" else _SUBLAYERS]
        statistics = collect(anatomy, calibration.batches, wanted, (), progress=calibration.progress)
        remove(anatomy, ranked(units_of(anatomy, variant), statistics)[0])
        dropped += 1


def _span(anatomy: Anatomy, calibration: Calibration, budget: float, drop: int) -> Unit:
    """The sublayers of the n adjacent blocks with the highest mean cos(h_i, h_i+n); of equal ones the later span.

    n is the fewest of which any span frees enough.
    """
    units, sizes = units_of(anatomy, "consecutive"), Sizes(anatomy)
    spans: list[Unit] = []
    for count in [drop] if drop else range(1, len(units)):
        spans = [sum(units[start : start + count], ()) for start in range(len(units) - count + 1)]
        if all(sizes.without(span) <= budget for span in spans):
            break
    values = span_similarities(anatomy, calibration, len(units) - len(spans) + 1)
    return spans[max(range(len(spans)), key=lambda start: (float(values[start]), start))]


@torch.no_grad()
def span_similarities(anatomy: Anatomy, calibration: Calibration, length: int) -> Tensor:
    """E[cos(h_i, h_i+length)] over positions, for every i (blocks - length + 1); h_i enters block i.

    The authors' code reads the entry of spans one block longer than what it then removes; this one does not.
    """
    blocks = anatomy.blocks
    sums = torch.zeros(len(blocks) - length + 1, dtype=torch.float64)
    positions = 0
    for batch in calibration.shown(calibration.batches, "similarity of spans"):
        feed = feeds_of(anatomy, [batch])[0]
        mask = feed.mask
        hidden = feed.hidden
        entered = deque([hidden], maxlen=length + 1)  # the streams that a span ending here may have begun with
        for block in blocks:
            hidden = run_block(block.module, hidden, feed.calls[block.index])
            entered.append(hidden)
            if len(entered) > length:
                cosine = torch.nn.functional.cosine_similarity(entered[0].float(), hidden.float(), dim=-1)
                counted = cosine if mask is None else cosine[mask.bool()]
                sums[block.index + 1 - length] += counted.sum(dtype=torch.float64).cpu()
        positions += hidden.shape[:2].numel() if mask is None else int(mask.sum())
    return sums / positions


def remove(anatomy: Anatomy, gone: Collection[Sublayer]) -> None:
    """Drop these sublayers; a block of which nothing is left goes as a whole, where its model allows that."""
    blocks = anatomy.blocks
    touched = sorted({index for index, _ in gone}, reverse=True)  # later ones first: the earlier keep their index
    empty = [
        index
        for index in touched
        if anatomy.can_drop_blocks
        and all((index, kind) in gone or getattr(blocks[index], kind) is None for kind in _KINDS)
    ]
    for index, kind in gone:
        if index not in empty:
            getattr(blocks[index], kind).drop()
    for index in empty:
        anatomy.drop_block(index)
