"""IA-RED²: a trained vision transformer drops the patches of each image that small interpreters find redundant (Pan et
al., NeurIPS 2021, arXiv:2106.12620).

The paper's text was not at hand: reward, baseline and curriculum are as others recall them, and the constants of the
training are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from ...anatomy import Anatomy
from ...errors import TransectError
from ...forward import inputs_of, task_of
from ...parts import insert
from ...parts.catalog.ia_red2 import Decision, IARed2, Tokens
from ..registry import Calibration, Range, conversion
from ..stage import Loss, Stage

BACKBONE = 0.01  # learning rate of the blocks, over the interpreters'


def reward(kept: Tensor, present: Tensor, right: Tensor, penalty: float) -> Tensor:
    """R(u) = 1 - (kept / present)² of each image (B) if it is classified rightly, -penalty if not. masks: (B x P)."""
    share = kept.sum(1).double() / present.sum(1)
    return torch.where(right, 1 - share.square(), torch.full_like(share, -penalty))


def tokens_of(model: Any) -> Tokens:
    """What the groups of a converted model tell each other; TransectError for a model that is none."""
    for module in model.modules():
        if isinstance(module, IARed2) and module.owns_bank:
            return module.bank
    raise TransectError("this model drops no patches: convert it by ia-red2 first")


def decided(
    model: Any, batch: Any, learning: int | None = None, drawing: bool = False
) -> tuple[Tensor, list[Decision]]:
    """Logits (B x classes) of a batch, and what each group decided. learning, drawing: see `Tokens`."""
    tokens = tokens_of(model)
    tokens.learning, tokens.drawing = learning, drawing
    try:
        logits = model(**inputs_of(model, batch)).logits
        return logits, tokens.decisions
    finally:
        tokens.learning, tokens.drawing, tokens.decisions = None, False, []


def _learned(group: int, penalty: float) -> Loss:
    """In one group's turn: REINFORCE with the greedy actions as the baseline, and the cross-entropy on what is kept."""

    def loss(model: Any, teacher: Any, batch: Any) -> tuple[Tensor, float]:
        labels = batch["labels"].to(model.device)
        with torch.no_grad():
            logits, found = decided(model, batch, group)
            baseline = reward(found[group].kept, found[group].present, logits.argmax(-1) == labels, penalty)
        logits, found = decided(model, batch, group, drawing=True)
        one = found[group]
        assert one.log_probability is not None
        with torch.no_grad():
            advantage = reward(one.kept, one.present, logits.argmax(-1) == labels, penalty) - baseline
        policy = -(advantage.to(one.log_probability) * one.log_probability).sum()
        return functional.cross_entropy(logits.float(), labels, reduction="sum") + policy, float(len(labels))

    return loss


def _judged(group: int, penalty: float) -> Loss:
    """Minus the reward of the greedy actions: the model's own loss would have everything kept."""

    def loss(model: Any, teacher: Any, batch: Any) -> tuple[Tensor, float]:
        labels = batch["labels"].to(model.device)
        logits, found = decided(model, batch, group)
        one = found[group]
        return -reward(one.kept, one.present, logits.argmax(-1) == labels, penalty).sum(), float(len(labels))

    return loss


def _stages(groups: int, threshold: float, penalty: float) -> Sequence[Stage]:
    return [
        Stage(
            f"group {group}", lr=1e-3, share=1 / groups, loss=_learned(group, penalty), judged=_judged(group, penalty),
            rates=((r"\.interpreter\.", 1.0), ("", BACKBONE)),
        )
        for group in range(groups)
    ]  # fmt: skip


def _check(anatomy: Anatomy, groups: int, threshold: float, penalty: float) -> None:
    name, model = anatomy.architecture.name, anatomy.model
    if name != "vit" or task_of(model) != "classification":
        raise TransectError(
            f"ia-red2 drops single patches of a classifier with the plain blocks of ViT or DeiT, and this is {name} "
            f"({type(model).__name__}): pass such a model"
        )
    if groups > len(anatomy.blocks):
        raise TransectError(f"groups={groups} are more than the {len(anatomy.blocks)} blocks: choose fewer")
    heads, width = anatomy.config_value("heads"), anatomy.config_value("hidden")
    if width % heads:
        raise TransectError(f"the {heads} heads of an interpreter do not divide the width {width}")
    led = next((block.index for block in anatomy.blocks if not block.adds_up), None)
    if led is not None:
        raise TransectError(f"a part stands around block {led} already: take a model without one")


@conversion(
    "ia-red2",
    paper="arXiv:2106.12620",
    group="routed depth and tokens",
    exact="with a threshold of 0, at which every patch stays, it is the model as it was",
    check=_check,
    stages=_stages,
    causal=False,
)
def ia_red2(
    anatomy: Anatomy, calibration: Calibration, *,
    groups: Annotated[int, Range(1, 1000)] = 3, threshold: Annotated[float, Range(0, 1)] = 0.5,
    penalty: Annotated[float, Range(0, 1000)] = 0.5,
) -> None:  # fmt: skip
    """A vision transformer drops, before each group of blocks, the patches of an image that it can do without.

    Every group has an interpreter, see `transect.parts.catalog.ia_red2`. They are trained one after the other, the
    first group's first, while later ones keep everything: actions are drawn, rewarded by `reward` against the greedy
    ones, and the blocks from the group on learn to classify from what is kept. The best state is that with the largest
    held-out reward. Single patches cannot be taken out of models with windows or convolutions, which are refused.

    groups: of blocks, each with an interpreter in front.
    threshold: a patch with a lower score is dropped; at 0 all stay.
    penalty: of a wrong answer (tau): the larger, the more is kept.
    """
    embeddings = anatomy.model.base_model.embeddings
    prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
    settings = {"groups": groups, "threshold": threshold, "prefix": prefix}
    insert(anatomy.model, "block", "ia-red2", settings=settings, seed=calibration.seed)


@torch.no_grad()
def heat_map(model: Any, pixel_values: Tensor, group: int = 1) -> Tensor:
    """The scores of one group in the places of the patches (B x rows x columns); NaN where none was given any more.

    They are the policy's view, and no attribution: only dropping a patch says what it does. The demo shows them from
    0.48, near which the decision lies, to 1.
    """
    decisions = decided(model.eval(), {"pixel_values": pixel_values})[1]
    if not 0 <= group < len(decisions):
        raise TransectError(f"group={group} is none of the {len(decisions)} groups")
    size, patch = (_pair(getattr(model.config, name)) for name in ("image_size", "patch_size"))
    return decisions[group].scores.unflatten(1, (size[0] // patch[0], size[1] // patch[1]))


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])
