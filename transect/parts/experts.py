"""What methods share that cut a dense MLP into experts: groups of its neurons, of which each position runs a few.

An MLP is a sum over its neurons, so that every partition of them gives experts whose sum is the MLP:
y = b + Σ_e W_down[:, I_e] act(W_up[I_e] x + b_up[I_e]), with the rows I_e of a gate beside those of up. Neurons that
are not chosen are not computed: positions are gathered by expert, and what comes out is added where it came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from ..anatomy.record import record_of
from ..errors import TransectError
from .part import MLPPart
from .precision import wide

Function = Literal[
    "silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu",
    "mish", "sigmoid", "tanh", "linear",
]  # fmt: skip
_PADDED = 1.25  # batched products, where with all experts' positions padded to the most there are so many times as many


@dataclass
class Sent:
    """Which positions go to which expert.

    positions: their numbers, expert after expert (P). sizes: how many each expert gets. weights: by what is multiplied
    what an expert makes of them (P), or None for 1.
    """

    positions: Tensor
    sizes: list[int]
    weights: Tensor | None = None


def by_expert(chosen: Tensor, weights: Tensor | None, count: int) -> Sent:
    """The positions' choices, sorted by expert. chosen, weights: each position's experts (T x k)."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat, minlength=count).tolist()
    return Sent(order // chosen.shape[-1], sizes, None if weights is None else weights.flatten()[order])


def best_experts(scores: Tensor, active: int, scaled: bool) -> tuple[Tensor, Tensor | None]:
    """Each position's experts of the highest scores (... x k), and by what their outputs are multiplied.

    scores: (... x experts). scaled: the softmax over those that were kept, times how many they are, so that even gates
    leave the plain sum; otherwise None.
    """
    values, chosen = scores.topk(active, dim=-1)
    return chosen, wide(values).softmax(-1) * active if scaled else None


def balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """n Σ_i share_i p_i: 1 where all n experts are used alike, n where one is used alone (Fedus et al. 2022, eq. 4).

    probabilities: (T x n). chosen: (T x k). share_i: of the choices; p_i: mean probability, which has the gradient.
    """
    count = probabilities.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=count).to(probabilities.dtype) / chosen.numel()
    return count * (share * probabilities.mean(0)).sum()


class SplitMLP(nn.Module):
    """The neurons of an MLP in groups of one size, without what is added behind them.

    A neuron is row j of up and gate, and column j of down; all are stored once, and by groups: up, gate and down
    (groups x size x width). function: see `Function`. bias: of up and gate.
    """

    def __init__(self, width: int, groups: int, size: int, function: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.groups, self.size = groups, size
        self.function = ACT2FN[function]
        self.gate = self.up_bias = self.gate_bias = None
        self.up = _uniform(width, groups, size, width)
        self.down = _uniform(groups * size, groups, size, width)
        if bias:
            self.up_bias = _uniform(width, groups, size)
        if gated:
            self.gate = _uniform(width, groups, size, width)
            if bias:
                self.gate_bias = _uniform(width, groups, size)

    def all(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of all groups: (T x d) -> (T x d). weights: of each group's part of it (T x groups)."""
        up, down = self.up.flatten(0, 1), self.down.flatten(0, 1)
        hidden = self._hidden(functional.linear(x, up, _flat(self.up_bias)), lambda: functional.linear(
            x, self.gate.flatten(0, 1), _flat(self.gate_bias)  # type: ignore[union-attr]
        ))  # fmt: skip
        if weights is not None:
            hidden = (hidden.unflatten(-1, (self.groups, -1)) * weights[..., None].to(hidden.dtype)).flatten(-2)
        return hidden @ down

    def one(self, number: int, x: Tensor) -> Tensor:
        """What one group makes of x: (n x d) -> (n x d)."""
        hidden = self._hidden(functional.linear(x, self.up[number], _of(self.up_bias, number)), lambda: (
            functional.linear(x, self.gate[number], _of(self.gate_bias, number))  # type: ignore[index]
        ))  # fmt: skip
        return hidden @ self.down[number]

    def each(self, x: Tensor) -> Tensor:
        """What every group makes of inputs of its own: (groups x n x d) -> (groups x n x d)."""
        hidden = self._hidden(_added(x @ self.up.mT, self.up_bias), lambda: (
            _added(x @ self.gate.mT, self.gate_bias)  # type: ignore[union-attr]
        ))  # fmt: skip
        return hidden @ self.down

    def forward(self, x: Tensor, sent: Sent) -> Tensor:
        """The sum of what the groups make of the positions that are sent to them: (T x d) -> (T x d)."""
        most = max(sent.sizes)
        if 0 < most * self.groups <= _PADDED * len(sent.positions):
            y = self._batched(x, sent, most)
        else:
            pieces = [self.one(number, x[at]) for number, at in enumerate(sent.positions.split(sent.sizes)) if len(at)]
            y = torch.cat(pieces) if pieces else x[:0]
        if sent.weights is not None:
            y = y * sent.weights[:, None].to(y.dtype)
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, sent.positions, y)

    def _batched(self, x: Tensor, sent: Sent, most: int) -> Tensor:
        """All groups at once (P x d), each with as many inputs as the one that gets most."""
        sizes = torch.tensor(sent.sizes, device=x.device)
        experts = torch.arange(self.groups, device=x.device).repeat_interleave(sizes)
        within = torch.arange(len(experts), device=x.device) - (sizes.cumsum(0) - sizes)[experts]
        places = experts * most + within
        given = x.new_zeros(self.groups * most, x.shape[-1]).index_copy(0, places, x[sent.positions])
        return self.each(given.unflatten(0, (self.groups, most))).flatten(0, 1)[places]

    def _hidden(self, up: Tensor, gate: Any) -> Tensor:
        return self.function(up) if self.gate is None else self.function(gate()) * up

    @property
    def flops(self) -> int:
        """Operations of one group for one position."""
        return (4 if self.gate is None else 6) * self.size * self.up.shape[-1]


def neurons_by_groups(neurons: int, hidden: int, groups: int, active: int, whole: str) -> int:
    """How many of the neurons each of the groups gets. TransectError where they cannot be shared out.

    neurons: of the config. hidden: how many there are, or 0 for those. whole: what of them is shared out.
    """
    count = hidden or neurons
    if not 0 <= active <= groups:
        raise TransectError(f"active={active} of {groups} experts cannot be run: choose at most {groups}")
    if count % groups or count < groups:
        near = [n for n in range(1, count + 1) if count % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - groups))[:4])
        raise TransectError(
            f"{count} {whole} cannot be shared out evenly among {groups} experts: choose experts such as "
            f"{', '.join(map(str, near))}"
        )
    return count // groups


class ExpertsPart(MLPPart):
    """An MLP of which each position runs `active` of `experts`; see `set_active`."""

    active: int
    experts: int
    least_active: ClassVar[int] = 1


class SharedAndRouted(ExpertsPart):
    """Experts that every position runs, and some besides that its router chooses; the output's bias is added once.

    A subclass calls `build` in its constructor and defines `choose`. In training it leaves the balance of the experts
    in `auxiliary`.
    """

    least_active = 0

    def build(self, shared: SplitMLP, split: SplitMLP, active: int, out_bias: bool) -> None:
        """shared: run for every position, all its groups. split: the routed ones, a group each, `active` of which."""
        width = split.up.shape[-1]
        self.experts, self.active = split.groups, active
        self.shared, self.split = shared, split
        self.router = nn.Linear(width, split.groups, bias=False)
        self.out_bias = nn.Parameter(torch.zeros(width)) if out_bias else None
        self.__dict__["auxiliary"] = None

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the router's scores (T x experts): shares of the experts that sum to 1, for the balance (T x experts); the
        chosen ones, and by what they are multiplied (both T x active), or None for 1."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        y = self.shared.all(flat)
        if self.active:
            shares, chosen, weights = self.choose(wide(self.router(flat)))
            if self.training:
                self.__dict__["auxiliary"] = balance(shares, chosen)
            whole = weights is None and self.active == self.experts
            y = y + (self.split.all(flat) if whole else self.split(flat, by_expert(chosen, weights, self.experts)))
        if self.out_bias is not None:
            y = y + self.out_bias
        return y.view(x.shape).to(x.dtype)

    @property
    def flops(self) -> int:
        router = 2 * self.router.weight.numel() if self.active else 0
        return router + self.shared.groups * self.shared.flops + self.active * self.split.flops


def set_active(model: Any, active: int) -> None:
    """Let each position run so many experts from now on, in every MLP part that has them; the record notes it.

    0 is allowed where there is a shared expert. TransectError where there are fewer, or no such part.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, ExpertsPart)}
    if not found:
        raise TransectError("the model has no MLP of experts whose number could be chosen")
    for part in found.values():
        if not part.least_active <= active <= part.experts:
            raise TransectError(f"active={active}: between {part.least_active} and {part.experts} experts can be run")
    for path, part in found.items():
        part.active = active
        part.made_with["active"] = active
        record_of(model).set_module(path, part.describe())


def _uniform(inputs: int, *shape: int) -> nn.Parameter:
    """Numbers as those with which torch begins a linear layer of so many inputs."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(inputs))


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def _of(bias: Tensor | None, number: int) -> Tensor | None:
    return None if bias is None else bias[number]


def _added(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias[:, None]
