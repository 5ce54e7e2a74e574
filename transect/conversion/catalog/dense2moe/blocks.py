"""Mixture of blocks (Dense2MoE, Zheng et al., ICCV 2025, arXiv:2510.09094): groups of blocks, of which a few run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch

from ....anatomy import Anatomy
from ....errors import TransectError
from ....parameters import block_numbers
from ....parts import insert
from ....parts.catalog.dense2moe_blocks import Dense2MoEBlocks
from ....statistics import BlockSimilarity, collect
from ...registry import Calibration, Range, conversion
from ...routed import check_reach, check_routed, parts_around
from ...stage import Stage
from .follow import follow


def block_groups(anatomy: Anatomy, blocks: int, layers: str) -> list[list[int]]:
    """The groups: those that consecutive numbers make, or all blocks; what is left over at the end stays as it is."""
    named = layers.strip()
    chosen = block_numbers(layers, anatomy.blocks)
    count = len(chosen) // blocks
    groups = [chosen[at * blocks : (at + 1) * blocks] for at in range(count)]
    if not groups:
        raise TransectError(f"dense2moe-blocks: {len(chosen)} blocks are fewer than a group of {blocks}")
    if named and len(chosen) % blocks:
        raise TransectError(f"dense2moe-blocks: {len(chosen)} blocks are no groups of {blocks}: name a multiple of it")
    for group in groups:
        if group[-1] - group[0] + 1 != blocks:
            raise TransectError(
                f"dense2moe-blocks: the blocks {', '.join(map(str, group))} do not follow one another, so that they "
                "are no group"
            )
    return groups


def _check(anatomy: Anatomy, blocks: int, active: int, layers: str, **_: Any) -> None:
    if active > blocks:
        raise TransectError(f"dense2moe-blocks: active={active} of {blocks} blocks: choose at most {blocks}")
    check_routed(anatomy, "dense2moe-blocks", [one for group in block_groups(anatomy, blocks, layers) for one in group])


def follow_groups(model: Any, teacher: Any, batch: Any) -> tuple[Any, int]:
    """Distance of the predictions, and of the stream behind each group from the teacher's behind its last block."""
    parts = parts_around(Anatomy(model, weights=False), Dense2MoEBlocks)
    ends = [number for number, part in parts.items() if part.place == part.places - 1]
    return follow(model, teacher, batch, ends)


@conversion(
    "dense2moe-blocks",
    paper="arXiv:2510.09094",
    group="routed depth and tokens",
    exact="with all blocks of a group active it is the model as it was",
    check=_check,
    stages=(
        Stage(
            "blocks",
            train="full",
            lr=1e-4,
            loss=follow_groups,
            teacher=True,
            auxiliary=1e-2,
            rates=((r"\.part\.bank\.", 100.0),),
        ),
    ),
)
def dense2moe_blocks(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    blocks: Annotated[int, Range(1, 2**10)] = 2,
    active: Annotated[int, Range(1, 2**10)] = 1,
    prompt: Annotated[int, Range(1, 2**20)] = 32,
    layers: str = "",
) -> None:
    """Consecutive blocks become groups, of which each text runs a few adjacent ones; a router chooses by its beginning.

    What is passed by is neither computed nor cached. The routers begin with the blocks that change the stream most on
    the text, which all texts then run (ours: how they begin is not said). Then the blocks and routers follow the model
    as it was: its predictions, and the stream behind the last block of each group, with a balance of the choices
    (0.01, as of experts). Balance and rates are ours: 1e-4, and 1e-2 for routers, which few steps would not move else.

    blocks: m, in a group.
    active: κ, how many of them a text runs.
    prompt: how many first positions of a text decide; these run all blocks.
    layers: the blocks that are grouped, such as 2-7; default all. What is left over at the end is no group, and whole.
    """
    check_reach(calibration.data, "dense2moe-blocks", "prompt", prompt)
    groups, changed = block_groups(anatomy, blocks, layers), influence(anatomy, calibration)
    settings = {"active": active, "prompt": prompt}
    for group in groups:
        insert(anatomy.model, "block", "dense2moe-blocks", layers=group, settings=settings, seed=calibration.seed)
        router = parts_around(anatomy, Dense2MoEBlocks)[group[0]].bank
        with torch.no_grad():
            router.weight.zero_()
            router.bias.copy_(torch.tensor([changed[number] for number in group]))


def influence(anatomy: Anatomy, calibration: Calibration) -> Sequence[float]:
    """1 - cos of the stream in front of and behind each block, mean over the positions of the text."""
    kind = BlockSimilarity()
    found = collect(anatomy, calibration.batches, [kind], (), progress=calibration.progress)
    return [1 - float(found.value(f"blocks.{block.index}", kind)) for block in anatomy.blocks]
