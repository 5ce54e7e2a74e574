"""SReT, Sliced Recursive Transformer (Shen et al., ECCV 2022, arXiv:2111.05297): an encoder whose blocks repeat."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch

from ...anatomy import Anatomy
from ...errors import TransectError
from ...forward import task_of
from ...parts import insert
from ...parts.insert import check_places
from ..attention import check_mixer, put_mixer
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def _check(anatomy: Anatomy, loops: int, groups: int, groups_later: int, **_: Any) -> None:
    if task_of(anatomy.model) == "causal":
        raise TransectError(
            f"sret slices images and other texts that are read as a whole, and {type(anatomy.model).__name__} predicts "
            "the next token: take an encoder, such as a ViT"
        )
    if loops > 1:
        anatomy.refuse_dropping_blocks()
    if anatomy.record.tied:
        raise TransectError("sret: some places share parameters already: take the model as it was before")
    for block in anatomy.blocks:
        check_places(block)
    if (slices := max(groups, groups_later)) > 1:
        check_mixer(anatomy, "sliced", range(len(anatomy.blocks)))
        if slices > (most := _most_positions(anatomy)):
            raise TransectError(
                f"sret: {slices} slices of {most} positions, which is all that {type(anatomy.model).__name__} reads, "
                "cannot be cut: give fewer groups"
            )


def _most_positions(anatomy: Anatomy) -> float:
    """Positions that the model reads at most, patches of an image and what stands before them among them."""
    learned = getattr(getattr(anatomy.model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(learned, torch.Tensor):
        return learned.shape[1]
    return getattr(anatomy.config, "max_position_embeddings", None) or math.inf


def recursive(
    anatomy: Anatomy, loops: int, ratio: float, groups: int, groups_later: int, shuffle: str, seed: int = 0
) -> list[list[int]]:
    """Let each block stand `loops` times in a row, with SReT around each turn, in place; where each stands then.

    All weights of sums are 1, as the paper begins a training.
    """
    count = len(anatomy.blocks)
    anatomy.arrange([number for number in range(count) for _ in range(loops)])
    turns = [list(range(number * loops, (number + 1) * loops)) for number in range(count)]
    if max(groups, groups_later) > 1:
        for turn in range(loops):
            chosen = groups if turn == 0 else groups_later
            moved = shuffle if turn and chosen > 1 else "none"
            put_mixer(
                anatomy, "sliced", [places[turn] for places in turns], {"groups": chosen, "shuffle": moved}, seed
            )  # fmt: skip
    insert(anatomy.model, "block", "sret", settings={"ratio": ratio}, seed=seed)
    for places in turns:
        anatomy.tie(places, lambda name: not name.startswith("around."))
    return turns


@conversion(
    "sret",
    paper="arXiv:2111.05297",
    group="loops and shared blocks",
    exact="with one slice it is the model as it was, whose further turns are yet to be learned",
    check=_check,
    stages=(Stage("sret", train="full", lr=1e-4, lowers="distill"),),
    causal=False,
)
@torch.no_grad()
def sret(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    loops: Annotated[int, Range(1, 64)] = 2,
    ratio: Annotated[float, Range(0, 64)] = 1.0,
    groups: Annotated[int, Range(1, 2**16)] = 1,
    groups_later: Annotated[int, Range(1, 2**16)] = 1,
    shuffle: Literal["none", "fixed", "random"] = "fixed",
) -> None:
    """Every block is gone through several times in a row, with small networks of their own in between.

    The block's numbers are shared by its turns. Turns after the first begin with weights of 0 on what they add, and so
    do the networks between, so that the model begins as what it was (ours: the paper trains from new weights, with all
    of them 1). Then all blocks follow its earlier predictions.

    loops: how often each block is gone through.
    ratio: how wide the networks between are, in widths of the stream; 0 leaves them out.
    groups: into how many slices of positions attention is cut in the first turn.
    groups_later: the same in those after it.
    shuffle: whether positions are shuffled before they are sliced in the later turns, see the mixer `sliced`.
    """
    turns = recursive(anatomy, loops, ratio, groups, groups_later, shuffle, calibration.seed)
    for places in turns:
        for turn, place in enumerate(places):
            part: Any = anatomy.blocks[place].module.leading
            if turn:
                part.z.copy_(part.z.new_tensor([1.0, 0.0, 1.0, 0.0]))
            if part.c is not None:
                part.c.copy_(part.c.new_tensor([1.0, 0.0]))
