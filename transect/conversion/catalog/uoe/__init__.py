"""Union of experts (Yang et al. 2025, arXiv:2503.02495): trained MLPs, and attention, cut into experts."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from ....anatomy import Anatomy
from ....errors import TransectError
from ....parameters import block_numbers
from ....parts.catalog.uoe.mlp import Gates, Selection
from ....parts.experts import neurons_by_groups
from ...experts import cuttable_mlp, put_experts
from ...inputs import inputs_of_modules
from ...registry import Calibration, Range, conversion
from ...stage import Stage
from .head_groups import check_can_group, put_head_groups
from .partition import Partition, fit_router, in_groups, lengths_added

ROWS = 4096  # positions of the text that are looked at; each block's inputs at these are in memory at once


def _check(
    anatomy: Anatomy,
    experts: int,
    active: int,
    selection: str,
    groups: int,
    active_groups: int,
    layers: str,
    **_: object,
) -> None:
    if selection != "token" and anatomy.model.main_input_name != "pixel_values":
        raise TransectError(
            f"uoe: selection={selection!r} chooses by all positions of a sequence, with padding and what is behind: it "
            "is for models of images; take selection='token'"
        )
    chosen = block_numbers(layers, anatomy.blocks)
    for number in chosen:
        neurons_by_groups(cuttable_mlp(anatomy.blocks[number]).neurons, 0, experts, active, "neurons")
    if groups:
        check_can_group(anatomy, chosen, groups, active_groups)


@conversion(
    "uoe",
    paper="arXiv:2503.02495",
    group="experts",
    exact="with all experts active and gates that only rank it is the model as it was",
    check=_check,
    stages=(Stage("uoe", train="full", lr=1e-4, lowers="distill"),),
    causal=False,
)
def uoe(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    experts: Annotated[int, Range(1, 2**16)] = 4,
    active: Annotated[int, Range(1, 2**16)] = 2,
    partition: Partition = "co-activation",
    router: Literal["fitted", "random"] = "fitted",
    gates: Gates = "scaled",
    compensate: bool = False,
    selection: Selection = "token",
    groups: Annotated[int, Range(0, 2**12)] = 0,
    active_groups: Annotated[int, Range(1, 2**12)] = 1,
    layers: str = "",
) -> None:
    """Every MLP becomes experts that add up to it, of which each position runs a few; attention too, if asked for.

    Nothing is stored twice: it has the numbers of the model and a gate. The authors train from scratch; here all
    numbers of the blocks follow the predictions of the model as it was. Which neurons belong together, and which
    experts a position needs, is found on the text (ours).

    experts: of an MLP; the number divides its neurons.
    active: how many of them each position runs.
    partition: of the neurons: co-activation brings together those that are active at the same positions; order leaves
        them as they are, as the authors cut; random.
    router: fitted: the gate's scores are the linear function that is nearest to the length of what each expert adds;
        random, as for training from scratch. That of attention is always random.
    gates: scaled, by which the gate learns, or rank, which only chooses, see the part.
    compensate: multiply what the experts add by experts / active.
    selection: token: each position chooses. For models of images also expert: each expert takes its best positions, and
        sequence: all positions go to the same experts.
    groups: of heads that attention is cut into, a divisor of its heads of keys and values; 0 leaves attention as it is.
    active_groups: how many of them each position runs, and is seen in.
    layers: only these blocks, such as 0-5,7; default all.
    """
    chosen = block_numbers(layers, anatomy.blocks)
    looks = partition == "co-activation" or router == "fitted"
    mlps = {number: anatomy.model.get_submodule(str(anatomy.blocks[number].slot_path("mlp"))) for number in chosen}
    inputs = inputs_of_modules(anatomy, mlps, calibration.batches, ROWS) if looks else {}
    settings = {
        "experts": experts, "active": active, "gates": gates, "compensate": compensate, "selection": selection
    }  # fmt: skip
    for number in chosen:
        mlp, x = cuttable_mlp(anatomy.blocks[number]), inputs.get(number)
        draws = torch.Generator().manual_seed(calibration.seed + number)
        order = in_groups(mlp, experts, partition, draws, x)
        part = put_experts(anatomy, number, "uoe", mlp, settings, calibration.seed + number)
        mlp.put(part.split, order)
        if router == "fitted" and x is not None:
            fit_router(part.router, x, lengths_added(part.split, x))
    if groups:
        put_head_groups(anatomy, chosen, groups, {"active": active_groups, "gates": gates}, calibration.seed)
