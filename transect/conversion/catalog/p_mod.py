"""p-MoD (Zhang et al., ICCV 2025, arXiv:2412.04449): blocks that process fewer context tokens the deeper they are."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from ...anatomy import Anatomy
from ...errors import TransectError
from ...parameters import block_numbers
from ...parts import insert
from ...parts.catalog.p_mod import kept_of
from ..registry import Calibration, Range, conversion
from ..routed import check_reach, check_routed, loss_behind
from ..stage import Stage

Decay = Literal["cosine", "linear", "constant", "alternate"]
DENSE, LEAST = 0.85, 0.15  # above this share a block stays as it is; no block keeps less than that


def shares(blocks: int, decay: Decay, mean: float) -> list[float]:
    """R_l, the share of the targets that each block processes; 1 for blocks that stay as they are.

    mean: ρ of the schedules that fall; of constant and alternate the share itself, the latter in every second block.
    """
    found = []
    for block in range(blocks):
        depth = block / max(1, blocks - 1)
        if decay == "cosine":
            share = math.cos(math.pi * depth) / 2 + mean
        elif decay == "linear":
            share = 0.5 - depth + mean
        else:
            share = mean if decay == "constant" or block % 2 else 1.0
        falls = decay in ("cosine", "linear")
        found.append((1.0 if share > DENSE else max(share, LEAST)) if falls else share)
    return found


def _chosen(anatomy: Anatomy, decay: Decay, mean: float, layers: str) -> dict[int, float]:
    """The blocks that get a router, and the share of the targets that each processes."""
    planned = shares(len(anatomy.blocks), decay, mean)
    if layers.strip():
        return {number: planned[number] for number in block_numbers(layers, anatomy.blocks)}
    return {number: share for number, share in enumerate(planned) if share < 1 or decay == "constant"}


def _check(anatomy: Anatomy, decay: Decay, mean: float, layers: str, targets: int, **_: Any) -> None:
    chosen = _chosen(anatomy, decay, mean, layers)
    check_routed(anatomy, "p-mod", list(chosen), multiplied=True)
    if len(_empty(chosen, targets)) == len(chosen):
        raise TransectError(
            f"p-mod: none of the {len(chosen)} blocks processes any of the targets={targets}, which chooses nothing: "
            "name more targets, a larger mean, or other layers"
        )


def _empty(chosen: dict[int, float], targets: int) -> list[int]:
    """The blocks that process no target, since fewer than one is their share."""
    return [number for number, share in chosen.items() if kept_of(targets, share) == 0]


def _stages(targets: int, **_: Any) -> list[Stage]:
    return [Stage("p-mod", train="full", lr=2e-5, loss=loss_behind(targets))]


@conversion(
    "p-mod",
    paper="arXiv:2412.04449",
    group="routed depth and tokens",
    exact="with decay=constant and mean=1 it is the model as it was, before the training",
    check=_check,
    stages=_stages,
)
def p_mod(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    targets: Annotated[int, Range(1, 2**20)] = 24,
    decay: Decay = "cosine",
    mean: Annotated[float, Range(0, 1)] = 0.5,
    gate: Literal["tanh", "sigmoid", "softmax"] = "tanh",
    symmetric: bool = True,
    alpha: Annotated[float, Range(0, 1)] = 0.2,
    layers: str = "",
) -> None:
    """Each block processes only some of the first tokens of a text, fewer the deeper it is, and caches only those.

    In the paper these are an image's tokens; here the first ones of the text, which the rest of it reads as context.
    Every number of the blocks is trained, at 2e-5, on the predictions behind them. Prompts should be at least as long:
    in a shorter one nothing is left out, and generation without the cache begins to leave out once the text is as long.

    targets: how many first positions may be left out.
    decay: R_l over the blocks: cos(π l / (L - 1)) / 2 + mean, 0.5 - l / (L - 1) + mean, or the same in all, or in every
        second block; where it falls, blocks above 0.85 stay as they are, and none is below 0.15.
    mean: see decay.
    gate: how what is processed is weighed; see the part.
    symmetric: whether what is left out is weighed too.
    alpha: how far from 1 the weights may be, with tanh.
    layers: only these blocks, such as 4-11; default all that the schedule says.
    """
    check_reach(calibration.data, "p-mod", "targets", targets)
    chosen = _chosen(anatomy, decay, mean, layers)
    if empty := _empty(chosen, targets):
        calibration.told["blocks that process none of the targets"] = float(len(empty))
    shared = {"targets": targets, "gate": gate, "symmetric": symmetric, "alpha": alpha}
    for number, share in chosen.items():
        insert(anatomy.model, "block", "p-mod", layers=[number], settings={**shared, "keep": share})
