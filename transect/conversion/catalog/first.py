"""FiRST (Jain et al., Findings of EMNLP 2025, arXiv:2410.12513): routers that skip blocks, then low-rank updates."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch

from ...anatomy import Anatomy
from ...data import Batches
from ...errors import TransectError
from ...forward.mode import at_rest
from ...forward.objective import run_body, to_device
from ...parameters import block_numbers
from ...parts import insert
from ...parts.catalog.first import First
from ..registry import Calibration, Range, conversion
from ..routed import check_reach, check_routed, parts_around
from ..stage import Stage

ROUNDS = 3  # in which thresholds are found: what is skipped changes what later routers read


def _chosen(anatomy: Anatomy, layers: str) -> list[int]:
    """The blocks that get a router: those named, by default all but the first and the last."""
    return block_numbers(layers, anatomy.blocks) if layers.strip() else list(range(1, len(anatomy.blocks) - 1))


def _check(anatomy: Anatomy, layers: str, skip: float, **_: Any) -> None:
    chosen, count = _chosen(anatomy, layers), len(anatomy.blocks)
    if {0, count - 1} & set(chosen):
        raise TransectError(f"first: the first and the last block are never skipped; layers are 1 to {count - 2}")
    check_routed(anatomy, "first", chosen)
    if skip * count > len(chosen):
        raise TransectError(
            f"first: skip={skip:g} of {count} blocks is more than the {len(chosen)} that have routers: choose less, or "
            "more layers"
        )
    if skip * count > len(chosen) - 1e-9:
        raise TransectError(
            f"first: at skip={skip:g} every text skips all {len(chosen)} blocks that have routers, which chooses "
            "nothing: choose less, or more layers; llm-drop takes blocks out"
        )


def _harden(anatomy: Anatomy, hard: bool) -> None:
    for part in parts_around(anatomy, First).values():
        part.hard = hard


@torch.no_grad()
def set_thresholds(anatomy: Anatomy, batches: Batches, skip: float, each: bool) -> None:
    """Thresholds with which sequences skip that share of the model's blocks on average, in place.

    each: every router's own, so that all are passed by equally often; else one for all of them.
    """
    parts = list(parts_around(anatomy, First).values())
    share = skip * len(anatomy.blocks) / len(parts)
    if skip == 0:
        return
    for part in parts:
        part.threshold.fill_(-1.0)
    for _ in range(ROUNDS):
        found = torch.stack(decisions(anatomy, batches))  # routers x sequences
        pooled = found if each else found.reshape(1, -1).expand(len(parts), -1)
        for part, rho in zip(parts, pooled, strict=True):
            # Half-way between two sequences: on one of them, rounding would decide.
            order, count = torch.cat([rho.new_tensor([-1.0]), rho.sort().values, rho.new_tensor([1.0])]), len(rho)
            at = round(share * count)
            part.threshold.fill_(float(order[at] + order[at + 1]) / 2 if at < count else 1.0)


@torch.no_grad()
def decisions(anatomy: Anatomy, batches: Batches) -> list[torch.Tensor]:
    """ρ of every sequence that is long enough, a tensor for each router in order, as the model is."""
    parts = list(parts_around(anatomy, First).values())
    for part in parts:
        part.decided = []
    try:
        with at_rest(anatomy.model):
            for batch in batches:
                run_body(anatomy.model, to_device(batch, anatomy.model.device))
        return [torch.cat(part.decided) for part in parts]
    finally:
        for part in parts:
            part.decided = None


def _tell(anatomy: Anatomy, calibration: Calibration) -> None:
    """What share of the routed blocks the training text skips."""
    parts = parts_around(anatomy, First).values()
    shares = [
        (rho <= part.threshold).double().mean()
        for rho, part in zip(decisions(anatomy, calibration.batches), parts, strict=True)
    ]
    calibration.told["share of the blocks with routers that the text skips"] = float(sum(shares)) / len(shares)


def _stages(penalty: float, skip: float, thresholds: str, rank: int, **_: Any) -> list[Stage]:
    return [
        Stage(
            "routers", train="new", new=r"\.around\.part\.(weight|bias)$", lr=1e-2, auxiliary=penalty, share=0.5,
            keeps="last", begin=partial(_harden, hard=False),
        ),
        Stage(
            "low-rank", train="lora", rank=rank, alpha=2.0 * rank, lr=1e-3, auxiliary=0.0, share=0.5,
            begin=partial(_harden, hard=True), learn=partial(set_thresholds, skip=skip, each=thresholds == "each"),
        ),
    ]  # fmt: skip


@conversion(
    "first",
    paper="arXiv:2410.12513",
    group="routed depth and tokens",
    exact="before its routers are trained nothing is skipped: it is the model as it was",
    check=_check,
    stages=_stages,
    after=_tell,
)
def first(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    prompt: Annotated[int, Range(1, 2**20)] = 32,
    skip: Annotated[float, Range(0, 1, below=True)] = 0.0,
    thresholds: Literal["common", "each"] = "common",
    penalty: Annotated[float, Range(0, 1e6)] = 0.01,
    gate: Literal["soft", "straight-through"] = "straight-through",
    start: Annotated[float, Range(-100, 100)] = 3.0,
    rank: Annotated[int, Range(1, 2**12)] = 8,
    layers: str = "",
) -> None:
    """A router in front of each block decides, from the beginning of a text, whether the rest of it skips the block.

    First only the routers are trained, by the model's own loss and the sum of their probabilities of running; then
    low-rank updates of all matrices, with blocks skipped as they are afterwards. What is skipped is neither computed
    nor cached. Not stated in what could be read of the paper, and ours: the routers' form, how they begin, the rates,
    the rank, and how a share is hit. The paper's further penalty on the routers' weights, whose size is not stated, is
    left out. Most of the quality is said to come from the low-rank updates.

    prompt: how many first positions of a text decide; these run all blocks.
    skip: share of the model's blocks that texts skip on average, by thresholds found on the training text between the
        two stages; 0 leaves them at a half, and the penalty alone says how much is skipped.
    thresholds: one for all routers, or each its own, with which all are passed by equally often.
    penalty: λ, weight of the routers' summed probabilities; the paper has 0.01.
    gate: in the routers' training, see the part.
    start: of each router, in logits.
    rank: of the updates; their alpha is twice that.
    layers: the blocks that get a router, such as 1-5,7; default all but the first and the last, which never may.
    """
    check_reach(calibration.data, "first", "prompt", prompt)
    settings = {"prompt": prompt, "start": start, "gate": gate}
    insert(anatomy.model, "block", "first", layers=_chosen(anatomy, layers), settings=settings, seed=calibration.seed)
