"""Where a mixer meets transformers: masks, rotary positions and caches become what a mixer knows of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TransectError
from ..operators.base import Described
from ..operators.build import build
from .part import Around, Mixer
from .state import state_layer


class MixerSlot(Described):
    """Stands for an attention module and hands its input to a mixer.

    part: the mixer. layer: number of the block, under which the cache keeps its state. returns: how many values the
    attention's forward returned (`Architecture.attention_returns`).
    """

    kind = "mixer"
    slot = "mixer"

    def __init__(self, part: Mixer, layer: int, returns: int) -> None:
        super().__init__()
        self.part = part
        self.layer_idx = layer
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        around = Around(real_positions_in(kwargs.get("attention_mask"), x.shape[1]), kwargs.get("position_embeddings"))
        layer = None if cache is None else state_layer(cache, self.layer_idx)
        if layer is not None:
            around.state, around.past = layer.state, layer.seen
        y = self.part(x, around)
        if layer is not None:
            layer.seen += x.shape[1]
        return (y, *[None] * (self.returns - 1)) if self.returns else y

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer_idx": self.layer_idx, "returns": self.returns, "part": self.part.describe()}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> MixerSlot:
        part = build(description["part"], inside=True)
        if not isinstance(part, Mixer):
            raise ValueError(f"a {type(part).__name__} is no mixer")
        return cls(part, description["layer_idx"], description["returns"])


def real_positions_in(mask: Any, count: int) -> Tensor | None:
    """Which of the last `count` positions are real (B x count), from an attention mask of transformers; None if all.

    mask: None; (B x K), nonzero where real; or (B x h x Q x K), true or near zero where a query may see a key: a key is
    real if some query sees it.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TransectError(
            f"a mask of type {type(mask).__name__} cannot be read by a mixer: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    if mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        real = seen.any(dim=1).any(dim=1)
    else:
        real = mask != 0
    real = real[:, -count:]
    return None if bool(real.all()) else real
