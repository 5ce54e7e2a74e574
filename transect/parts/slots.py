"""Where parts meet transformers: masks, rotary positions and caches become what a mixer knows of, a block's call what
a part around it may do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.surgery import argument
from ..errors import TransectError
from ..operators.base import Described
from ..operators.build import build
from .kept import KeptLayer, run_kept
from .part import Around, BlockPart, Inside, Mixer
from .state import StateLayer, layer_of


class MixerSlot(Described):
    """Stands for an attention module and hands its input to a mixer.

    part: the mixer. layer: number of the block, under which the cache keeps its state. returns: how many values the
    attention's forward returned (`Architecture.attention_returns`). neighbours: whether the model's rotary angles are
    given for channels 2i and 2i + 1, instead of for i and i + width / 2 as mixers have them. adds: name and position of
    the argument that the attention added to its output itself (`Architecture.attention_adds`), or None.
    """

    kind = "mixer"
    slot = "mixer"

    def __init__(
        self, part: Mixer, layer: int, returns: int, neighbours: bool = False, adds: tuple[str, int] | None = None
    ) -> None:
        super().__init__()
        self.part = part
        self.layer_idx = layer
        self.returns = returns
        self.neighbours = neighbours
        self.adds = adds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        rotary = kwargs.get("position_embeddings")
        if rotary is not None and self.neighbours:
            cos, sin = (torch.cat([angles[..., ::2]] * 2, dim=-1) for angles in rotary)
            rotary = cos, sin
        around, mask = Around(rotary=rotary), kwargs.get("attention_mask")
        layer = None if cache is None else layer_of(cache, self.layer_idx, StateLayer)
        if layer is not None:
            mask = layer.until_now(mask, x.shape[1])
            around.state, around.past = layer.state, layer.seen
        around.real = real_positions_in(mask, x.shape[1])
        y = self.part(x, around)
        if layer is not None:
            layer.seen += x.shape[1]
        if self.adds is not None:
            y = y + argument(self.adds, args, kwargs)
        return (y, *[None] * (self.returns - 1)) if self.returns else y

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"kind": self.kind, "layer_idx": self.layer_idx, "returns": self.returns}
        if self.neighbours:
            described["neighbours"] = 1
        if self.adds is not None:
            described["adds"] = list(self.adds)
        return described | {"part": self.part.describe()}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> MixerSlot:
        part = build(description["part"], inside=True)
        if not isinstance(part, Mixer):
            raise ValueError(f"a {type(part).__name__} is no mixer")
        adds = description.get("adds")
        return cls(
            part, description["layer_idx"], description["returns"], bool(description.get("neighbours")),
            None if adds is None else (str(adds[0]), int(adds[1])),
        )  # fmt: skip


class BlockSlot(Described):
    """Leads a block (see `anatomy.surround`) by a part that stands around it.

    returns: how many values the block's forward returned (`Architecture.block_returns`). attention, mlp, norms: paths
    of these within the block; None where the block has no such module. adds: path of the module whose output the block
    adds as its MLP's, of a part that routes.
    """

    kind = "block"
    slot = "block"

    def __init__(
        self, part: BlockPart, returns: int, attention: str | None, mlp: str | None, norms: list[str],
        adds: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.part = part
        self.returns, self.attention, self.mlp, self.norms, self.adds = returns, attention, mlp, norms, adds

    def forward(self, block: nn.Module, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(_names(own.__func__), args, strict=False)), **kwargs}
        x = given.pop("hidden_states")
        others: tuple[Any, ...] = (None,) * (self.returns - 1)

        def whole(x: Tensor, **changed: Any) -> Tensor:
            nonlocal others
            result = own(hidden_states=x, **{**given, **changed})
            if self.returns:
                result, *rest = result
                others = tuple(rest)
            return result

        inside = Inside(
            whole,
            None if self.attention is None else _calling(block.get_submodule(self.attention), given),
            None if self.mlp is None else block.get_submodule(self.mlp),
            [block.get_submodule(path) for path in self.norms],
            lambda: real_positions_in(given.get("attention_mask"), x.shape[1]),
            lambda x, real: whole(x, attention_mask=_mask_of(real, x.dtype)),
        )
        layer = self._routed(block, whole, given, inside, x) if self.part.routes else None
        y = self.part(x, inside)
        if layer is not None:
            layer.seen += x.shape[1]
        return (y, *others) if self.returns else y

    def _routed(
        self, block: nn.Module, whole: Callable[..., Tensor], given: dict[str, Any], inside: Inside, x: Tensor
    ) -> KeptLayer | None:
        """Tell a part that routes what it may do; the layer of the cache, where there is one."""
        cache = given.get("past_key_values", given.get("layer_past"))
        attention: Any = block.get_submodule(str(self.attention))
        layer = None if cache is None else layer_of(cache, attention.layer_idx, KeptLayer)
        if layer is not None:
            if "attention_mask" in given:
                given["attention_mask"] = layer.until_now(given["attention_mask"], x.shape[1])
            inside.state, inside.past = layer.state, layer.seen
            inside.forget = layer.forget

        adds = None if self.adds is None else block.get_submodule(self.adds)

        def on(x: Tensor, kept: Tensor, gain: Tensor | None = None) -> Tensor:
            real = inside.real()
            return run_kept(whole, given, x, kept if real is None else kept & real, layer, gain, adds)

        inside.on = on
        return layer

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "returns": self.returns, "attention": self.attention, "mlp": self.mlp,
            "norms": self.norms, **({} if self.adds is None else {"adds": self.adds}), "part": self.part.describe(),
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> BlockSlot:
        part = build(description["part"], inside=True)
        if not isinstance(part, BlockPart):
            raise ValueError(f"a {type(part).__name__} stands around no block")
        known = {name: description[name] for name in ("returns", "attention", "mlp", "norms")}
        return cls(part, **known, adds=description.get("adds"))


def _mask_of(real: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (B x 1 x N x N) with which every position sees those that are true in `real` (B x N)."""
    mask = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, torch.finfo(dtype).min)
    return mask[:, None, None, :].expand(-1, -1, real.shape[1], -1)


def _calling(attention: nn.Module, given: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """The attention module with the arguments of its block that it takes; of what it returns, the output."""
    taken = _names(type(attention).forward)
    chosen = {name: value for name, value in given.items() if "kwargs" in taken or name in taken}

    def call(x: Tensor) -> Tensor:
        result = attention(hidden_states=x, **chosen)
        return result[0] if isinstance(result, tuple) else result

    return call


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module is called with."""
    return _names(type(module).forward)


@cache
def _names(forward: Any) -> tuple[str, ...]:
    """The names of a forward's arguments, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


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
