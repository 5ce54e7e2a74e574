"""What conversions share that run blocks on some positions, or sequences, only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..anatomy import Anatomy
from ..anatomy.surround import Surrounded
from ..data import Batches
from ..errors import TransectError
from ..forward.objective import IGNORED, inputs_of, summed_loss, targets_of
from ..parts.insert import check_routes, places


def parts_around(anatomy: Anatomy, kind: type) -> dict[int, Any]:
    """The parts of a class that stand around blocks, by the block's number."""
    found = {block.index: block.module.leading for block in anatomy.blocks if isinstance(block.module, Surrounded)}
    return {number: part for number, part in found.items() if isinstance(part, kind)}


def check_routed(anatomy: Anatomy, method: str, chosen: Sequence[int], multiplied: bool = False) -> None:
    """TransectError where one of these blocks cannot be routed, or there is none.

    multiplied: whether what its MLP adds is multiplied.
    """
    if not chosen:
        raise TransectError(f"{method}: no block is converted: name some by layers=, such as 2-5")
    for number in chosen:
        places(anatomy, "block", number)
        block = anatomy.blocks[number]
        check_routes(block)
        if multiplied and (block.has_experts or block.mlp is None):
            raise TransectError(
                f"{method} multiplies what the MLP of a block adds, and block {number} has experts, or a part there"
            )


def check_reach(data: Batches | None, method: str, setting: str, positions: int) -> None:
    """TransectError where no sequence of the training text goes beyond its first positions."""
    longest = max((len(text) for text in data.texts()), default=0) if data is not None else positions + 1
    if longest <= positions:
        raise TransectError(
            f"{method} routes what is behind the first {setting}={positions} positions, and the longest sequence has "
            f"{longest}: choose a smaller {setting}, or longer sequences"
        )


def loss_behind(positions: int) -> Any:
    """A stage's loss: the model's own, without the predictions at the first real positions of a sequence.

    What is kept of these depends on all of them, so that they would know of what they are to predict.
    """

    def loss(model: Any, teacher: Any, batch: Any) -> tuple[Tensor, float]:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        targets = targets_of(model, batch)
        real = batch.get("attention_mask")
        number = (targets.new_ones(targets.shape) if real is None else real[:, : targets.shape[1]]).long().cumsum(1)
        targets = targets.masked_fill(number <= positions, IGNORED).flatten()
        logits = model(**inputs_of(model, batch)).logits
        where = (targets != IGNORED).nonzero()[:, 0]
        return summed_loss(logits.reshape(-1, logits.shape[-1])[where], targets[where]), float(len(where))

    return loss
