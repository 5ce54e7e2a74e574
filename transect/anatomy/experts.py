"""The modules that hold the experts of a mixture: transformers' own, all in two tensors, and one module for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import NotApplicable, TransectError
from .storage import bare_linear, describe

EXPERT_ROLES = ("gate", "up", "down")


class SeparateExperts(nn.Module):
    """Experts with modules of their own: what a fused experts module becomes once one of its matrices changes.

    It is called as the fused one is, and computes what that computes one expert after another.
    each: for every expert, role (gate, up, down) -> map. activation: transformers' name of the function on gate.
    """

    def __init__(self, each: Iterable[Mapping[str, nn.Module]], activation: str) -> None:
        super().__init__()
        # Empty tensors under the names of the fused ones: see Stacked.
        self.register_buffer("gate_up_proj", torch.empty(0))
        self.register_buffer("down_proj", torch.empty(0))
        self.each = nn.ModuleList(nn.ModuleDict({role: maps[role] for role in EXPERT_ROLES}) for maps in each)
        self.activation = activation
        self.act_fn = ACT2FN[activation]

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self.each)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts add (N x d) to N positions. top_k_index, top_k_weights: each position's experts (N x k)."""
        added = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.each):
            rows, choice = torch.where(top_k_index == number)
            if len(rows) == 0:
                continue
            x = hidden_states[rows]
            y = expert["down"](self.act_fn(expert["gate"](x)) * expert["up"](x))  # type: ignore[index]
            added.index_add_(0, rows, (y * top_k_weights[rows, choice, None]).to(added.dtype))
        return added

    def describe(self) -> dict[str, Any]:
        each: list[Any] = [{role: describe(part) for role, part in expert.items()} for expert in self.each]  # type: ignore[union-attr]
        return {"kind": "experts", "activation": self.activation, "each": each}


class SkipExperts(nn.Module):
    """Stands for a dropped mixture of experts, router and all: adds nothing to the residual stream.

    experts: where the experts were within it; see Stacked for the empty tensor that stands there.
    """

    def __init__(self, experts: str) -> None:
        super().__init__()
        self.path = experts
        holder: nn.Module = self
        for part in experts.split("."):
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.register_buffer("down_proj", torch.empty(0))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)

    def describe(self) -> dict[str, Any]:
        return {"kind": "skip_experts", "experts": self.path}


def check_layout(module: Any, name: str) -> None:
    """Raise an error unless a fused experts module is of the one layout that is understood here."""
    odd = [
        what
        for what, attribute, usual in (
            ("keeps transposed matrices", "is_transposed", False),
            ("has biases", "has_bias", False),
            ("has no gate", "has_gate", True),
            ("interleaves gate and up", "is_concatenated", True),
            ("normalises each expert's output", "has_post_expert_norm", False),
        )
        if getattr(module, attribute, usual) is not usual
    ]
    if not all(getattr(getattr(module, tensor, None), "ndim", 0) == 3 for tensor in ("gate_up_proj", "down_proj")):
        odd.append("does not hold gate_up_proj and down_proj as three-dimensional tensors")
    if odd:
        raise TransectError(f"{name} is a {type(module).__name__} that {' and '.join(odd)}: not supported")


class StoredTogether(nn.Linear):
    """One expert's matrix where it lies in a fused module's tensor: writing to it writes there. Nothing calls it."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise NotApplicable("experts that are stored together run together: a single one cannot be listened to")

    register_forward_pre_hook = register_forward_hook


def expert_view(module: Any, number: int, role: str, kind: type[nn.Linear] = StoredTogether) -> nn.Linear:
    """An expert's matrix, as a linear layer whose weight lies in a fused module's tensor."""
    gate, up = module.gate_up_proj.detach()[number].chunk(2)
    weight = {"gate": gate, "up": up, "down": module.down_proj.detach()[number]}[role]
    with torch.device("meta"):
        view = bare_linear(weight.shape[1], weight.shape[0], False, kind)
    view.weight = nn.Parameter(weight, requires_grad=module.down_proj.requires_grad)
    return view.train(module.training)


def separate(module: Any, activation: str, copied: bool = True) -> SeparateExperts:
    """A fused module's experts with modules of their own. copied: False lets their weights lie in its tensors."""
    each = [
        {role: expert_view(module, number, role, nn.Linear) for role in EXPERT_ROLES}
        for number in range(module.num_experts)
    ]
    if copied:
        for linear in (linear for views in each for linear in views.values()):
            linear.weight = nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad)
    apart = SeparateExperts(each, activation).train(module.training)
    for stand_in in ("gate_up_proj", "down_proj"):
        setattr(apart, stand_in, getattr(module, stand_in).detach().new_empty(0))
    return apart


@contextmanager
def apart(model: nn.Module, hosts: Mapping[str, str]) -> Iterator[None]:
    """Inside the `with`, fused experts run one by one, as modules that can be listened to; no weight is copied.

    hosts: path of an experts module -> its activation's name. Those that are apart already stay as they are.
    """
    fused = {path: model.get_submodule(path) for path in hosts}
    fused = {path: module for path, module in fused.items() if not isinstance(module, SeparateExperts)}
    try:
        for path, module in fused.items():
            model.set_submodule(path, separate(module, hosts[path], copied=False))
        yield
    finally:
        for path, module in fused.items():
            model.set_submodule(path, module)
