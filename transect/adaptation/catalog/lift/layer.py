"""A linear layer of which some entries are trained, at positions that change now and then."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim import Optimizer

from ....errors import TransectError
from ...tuner import UpdateLayer
from .masks import at_random, budget, by_magnitude, principal


class ChangedLinear(torch.autograd.Function):
    """y = (W + changes) x in a given dtype; what is kept for the way back is x, W, positions and values.

    x (..., d_in), weight (d_out x d_in), and in `changes` by turns positions (k) and values (k) of a change; they are
    added one after the other, each rounded once to the type of W. Gradients go to x and to the values, whose gradient
    is Σ g xᵀ at their positions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, *changes: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *changes)
        ctx.dtype = dtype
        return functional.linear(x, _changed(weight, changes).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *changes = ctx.saved_tensors
        into_x = grad @ _changed(weight, changes).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        into_changes: list[Tensor | None] = [None] * len(changes)
        if any(ctx.needs_input_grad[3:]):
            whole = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).flatten()
            for place in range(1, len(changes), 2):
                if ctx.needs_input_grad[3 + place]:
                    into_changes[place] = whole[changes[place - 1]].to(changes[place].dtype)
        return into_x, None, None, *into_changes


def _changed(weight: Tensor, changes: Any) -> Tensor:
    """W with changes at some positions, in its own type: what merging makes of it."""
    whole = weight.clone(memory_format=torch.contiguous_format)
    flat = whole.view(-1)
    for positions, values in zip(changes[::2], changes[1::2], strict=True):
        flat[positions] = (flat[positions] + values).to(flat.dtype)
    return whole


class LiftLayer(UpdateLayer):
    """W + change, where the change is trained at k positions and stays as it is at those that were left.

    By adapter: `lift_delta` (k), trained, in float32 whatever the type of W; `lift_index` (k), its flat positions,
    ascending; `lift_settled_index` and `lift_settled_value` (s), the change of entries that are not trained any more.
    """

    adapter_layer_names = ("lift_delta",)
    other_param_names = ("lift_config", "lift_index", "lift_settled_index", "lift_settled_value")

    def prepare(self) -> None:
        self.lift_config: dict[str, Any] = {}
        self.lift_delta: Any = nn.ParameterDict()
        self.lift_index: Any = BufferDict(persistent=True)
        self.lift_settled_index: Any = BufferDict(persistent=True)
        self.lift_settled_value: Any = BufferDict(persistent=True)

    def build(self, name: str, config: Any) -> None:
        """An adapter that is only loaded gets its positions from its file: none are chosen for it."""
        weight = self.weight
        shape = (self.out_features, self.in_features)
        count = budget(*shape, config.rank)
        if config.select == "lift" and config.filter_rank > min(shape):
            warnings.warn(
                f"filter_rank {config.filter_rank} is above the rank {min(shape)} that a weight of {shape} can have: "
                "its entries are chosen by their own size", stacklevel=2,
            )  # fmt: skip
        kind = torch.int32 if weight.numel() < 2**31 else torch.int64
        given = config.inference_mode or weight.is_meta
        positions = torch.arange(count, device=weight.device) if given else self.choose(weight, config)
        values = torch.zeros(count, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.lift_config[name] = config
        self.lift_delta[name] = nn.Parameter(values)
        self.lift_index[name] = positions.to(kind)
        self.lift_settled_index[name] = positions[:0].to(kind)
        self.lift_settled_value[name] = values[:0].clone()

    def choose(self, weight: Tensor, config: Any) -> Tensor:
        """The positions that an adapter trains of this weight."""
        shape = (self.out_features, self.in_features)
        count = budget(*shape, config.rank)
        if config.select == "random":
            return at_random(shape, count, config.seed).to(weight.device)
        if config.select == "magnitude":
            return by_magnitude(weight, count)
        return principal(weight, count, config.filter_rank)

    def changes(self, name: str) -> list[Tensor]:
        """Positions and values of the trained and of the settled entries."""
        return [
            self.lift_index[name], self.lift_delta[name], self.lift_settled_index[name], self.lift_settled_value[name]
        ]  # fmt: skip

    def delta(self, name: str) -> Tensor:
        index, values, settled, kept = self.changes(name)
        whole = values.new_zeros(self.out_features * self.in_features)
        return whole.index_put((index,), values).index_put((settled,), kept).view(self.out_features, self.in_features)

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """(..., d_in) -> (..., d_out), by one product with the changed weight; the wrapped layer gives its bias."""
        around = isinstance(self.base_layer, BaseTunerLayer)  # another adapter, whose own change is not in the weight
        if self.disable_adapters or self.merged or around or arguments or named:
            return super().forward(x, *arguments, **named)
        weight, kind, bias = self.weight, x.device.type, self.base_layer.bias
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x = x.to(dtype)
        output = ChangedLinear.apply(
            x, weight, dtype, *(part for name in self.adapters() for part in self.changes(name))
        )
        return output if bias is None else output + bias.to(dtype)  # type: ignore[operator]

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Called after every step, counted from 1: chooses anew behind each `interval`-th.

        The released code does it one step earlier, behind steps T - 1, 2 T - 1 and so on.
        """
        for name in self.adapters():
            interval = self.lift_config[name].interval
            if interval and step % interval == 0 and self.lift_delta[name].requires_grad:
                self.refresh(optimizer, name)

    @torch.no_grad()
    def refresh(self, optimizer: Optimizer, name: str = "default") -> None:
        """Choose the positions anew, from the weights as they are now with their change (step 5 of the method).

        Entries that stay keep their change and the optimizer's tensors about them; those that enter begin with zeros
        there (and with the change that they had, if they were trained before), while the optimizer's count of steps
        goes on; those that leave keep their change, which is settled. All tensors that the optimizer holds in the
        parameter's shape are carried over like this.
        """
        if name in self.merged_adapters:
            raise TransectError(f"{name!r} is merged into the weight: unmerge it before its entries are chosen anew")
        old, values = self.lift_index[name], self.lift_delta[name]
        change = self.delta(name)
        chosen = self.choose(self.weight + change, self.lift_config[name]).to(old.dtype)
        change = change.flatten()
        values.copy_(change[chosen])
        values.grad = None  # it belongs to the entries before
        change[chosen] = 0
        settled = change.nonzero()[:, 0]
        self.lift_settled_index[name], self.lift_settled_value[name] = settled.to(old.dtype), change[settled]
        place = torch.searchsorted(old, chosen).clamp_max(len(old) - 1)
        stays = old[place] == chosen
        for held in optimizer.state.get(values, {}).values():
            if isinstance(held, Tensor) and held.shape == values.shape:
                held.copy_(torch.where(stays, held[place], torch.zeros_like(held)))
        old.copy_(chosen)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device alone: PEFT would round the values to the type of the weight, too."""
        for key in ("lift_delta", *self.other_param_names[1:]):
            held = getattr(self, key)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(device or self.weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """There may be any number of settled entries: make room for those that come."""
        for key in ("lift_settled_index", "lift_settled_value"):
            held = getattr(self, key)
            for name in list(held):
                if (given := state_dict.get(f"{prefix}{key}.{name}")) is not None:
                    held[name] = held[name].new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
