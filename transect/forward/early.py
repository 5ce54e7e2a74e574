"""What a causal model would say if it stopped behind one of its blocks: the same final norm and head, sooner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..anatomy import Anatomy
from .lens import Lens
from .objective import IGNORED, Batch, predictions, targets_of, to_device


def early_predictions(anatomy: Anatomy, batch: Batch, layers: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits (n x V) behind each of these blocks, those of the whole model, and the labels (n), from one pass.

    Raises NotApplicable for a model without a language-model head on its residual stream.
    """
    lens, model = Lens(anatomy), anatomy.model
    seen: dict[int, Tensor] = {}

    def watching(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [anatomy.blocks[layer].module.register_forward_hook(watching(layer)) for layer in layers]
    try:
        final, labels = predictions(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    counted = targets_of(model, to_device(batch, model.device)) != IGNORED
    return [lens(seen[layer][counted]) for layer in layers], final, labels
