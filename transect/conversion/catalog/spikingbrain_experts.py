"""SpikingBrain (Pan et al., 2025, arXiv:2509.05276), Section 3.2: a dense MLP as copies of itself, and a router."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch

from ...anatomy import Anatomy
from ...errors import TransectError
from ...parameters import block_numbers
from ..experts import cuttable_mlp, put_experts
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def _check(anatomy: Anatomy, layers: str, experts: int, active: int, **_: Any) -> None:
    if active > experts:
        raise TransectError(f"spikingbrain-experts: active={active} of {experts} experts: choose at most {experts}")
    for number in block_numbers(layers, anatomy.blocks):
        cuttable_mlp(anatomy.blocks[number])


@conversion(
    "spikingbrain-experts",
    paper="arXiv:2509.05276",
    group="experts",
    exact="with spread 0 and down alone scaled it is the model as it was",
    check=_check,
    stages=(Stage("spikingbrain-experts", train="full", lr=3e-5, auxiliary=0.01),),
)
@torch.no_grad()
def spikingbrain_experts(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    experts: Annotated[int, Range(1, 2**16)] = 16,
    active: Annotated[int, Range(0, 2**16)] = 1,
    shared: Annotated[int, Range(1, 2**16)] = 1,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    spread: Annotated[float, Range(0, 1)] = 0.02,
    scaled: Literal["all", "down"] = "all",
    layers: str = "",
) -> None:
    """Every MLP becomes copies of itself: shared ones that always run, and routed ones of which a few do.

    With all p near 1 / N the sum is (S + k / N) times the MLP. So each of its matrices is multiplied by the same
    factor, and all factors together by the inverse of that: the function between is not homogeneous, and the model only
    near what it was. Scaling down alone (ours) is exact for even p. The weight of the balance in the loss is ours
    (0.01; the report gives none). Its larger model leaves the MLPs of blocks 0-2, 4, 6, 8 and 10 as they are.

    experts: N, routed copies.
    active: k of them that each position runs; with 0 the shared ones alone are run.
    shared: S, copies that every position runs.
    scores: p is the softmax of the router's scores, or the sigmoid of each; with the latter p is near 1 / 2.
    spread: standard deviation of the router's first numbers.
    scaled: all matrices, or down alone.
    layers: only these blocks, such as 3,5,7,9,11-27; default all.
    """
    even = 1 / experts if scores == "softmax" else 0.5
    factor = 1 / (shared + active * even)
    settings = {"experts": experts, "active": active, "shared": shared, "scores": scores, "spread": spread}
    for number in block_numbers(layers, anatomy.blocks):
        mlp = cuttable_mlp(anatomy.blocks[number])
        part = put_experts(anatomy, number, "spikingbrain-experts", mlp, settings, calibration.seed)
        copied = torch.arange(mlp.neurons, device=mlp.up.device)
        each = factor ** (1 / (2 if mlp.gate is None else 3))
        for split in (part.shared, part.split):
            mlp.put(split, copied.repeat(split.groups))
            split.down.mul_(factor if scaled == "down" else each)
            if scaled == "all":
                for held in (split.up, split.gate, split.up_bias, split.gate_bias):
                    if held is not None:
                        held.mul_(each)
