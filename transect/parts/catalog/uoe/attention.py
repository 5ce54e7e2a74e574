"""Attention of a union of experts (Yang et al. 2025, arXiv:2503.02495): groups of heads, each over its positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ....errors import TransectError
from ...attention import seen_by, with_past
from ...experts import best_experts
from ...part import Around, Mixer
from ...rotary import rotated
from .mlp import Gates


class HeadGroup(nn.Module):
    """Some of the heads, with the rows of q, k and v and the columns of o that are theirs.

    Keys and values may have fewer heads than queries.
    """

    def __init__(self, width: int, heads: int, key_value_heads: int, head_size: int) -> None:
        super().__init__()
        self.repeats, self.head_size = heads // key_value_heads, head_size
        self.q_proj = nn.Linear(width, heads * head_size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, key_value_heads * head_size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def forward(self, x: Tensor, around: Around, causal: bool) -> Tensor:
        """What these heads add (B x n x d) to positions that see one another, and those before them in the state."""
        q, k, v = (
            one(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, real = rotated(q, around.rotary), rotated(k, around.rotary), around.real
        if around.state is not None:
            k, v, real = with_past(k, v, real, around.state)
        mask = seen_by(q.shape[2], k.shape[2], causal, real, q.device)
        k, v = (one if self.repeats == 1 else one.repeat_interleave(self.repeats, dim=1) for one in (k, v))
        alone = mask is None and causal and q.shape[2] == k.shape[2]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=alone)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))


class UnionAttention(Mixer):
    """Heads in groups; each position runs the k groups that a linear gate scores highest, and is seen in these alone.

    A group's queries, keys and values are of the positions that chose it, in their order and turned by their places in
    the text. So its work goes with the square of their number, and each group keeps its own positions in generation.
    The authors let each group take its best positions of the sequence, which looks ahead.

    experts: groups of heads; it divides the heads of keys and values.
    active: k, how many groups each position runs.
    gates: scaled multiplies a group's output by k times its share in the softmax over the chosen, so that the gate
        learns (but not with k = 1, where that is 1); rank only chooses.
    out_bias: of the output; it is added once.
    """

    kind = "mixer.uoe"
    paper = "arXiv:2503.02495"
    limit = "with all groups active and gates that only rank it is softmax attention"
    cost = "(k N / E)² for each of E groups"
    recurrent = True  # though its state grows

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *,
        experts: Annotated[int, Range(1, 2**12)] = 2, active: Annotated[int, Range(1, 2**12)] = 1,
        gates: Gates = "scaled", out_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        check_head_groups(key_value_heads, experts, active)
        self.active, self.scaled = active, gates == "scaled"
        self.experts = nn.ModuleList(
            HeadGroup(width, heads // experts, key_value_heads // experts, head_size) for _ in range(experts)
        )
        self.router = nn.Linear(width, experts)
        self.out_bias = nn.Parameter(torch.zeros(width)) if out_bias else None
        self.head_numbers = heads * head_size

    def mix(self, x: Tensor, around: Around) -> Tensor:
        chosen, weights = best_experts(self.router(x), self.active, self.scaled)
        weights = torch.ones_like(chosen, dtype=x.dtype) if weights is None else weights.to(x.dtype)
        given = x.new_zeros(*x.shape[:-1], len(self.experts)).scatter(-1, chosen, weights)  # B x N x E
        took = torch.zeros_like(given, dtype=torch.bool).scatter(-1, chosen, True)
        if around.real is not None:
            took = took & around.real[..., None]
        y = torch.zeros_like(x)
        for number, at, real in self._gathered(took):
            inner = _inner(around.state, number)
            here = Around(real, _picked_rotary(around.rotary, at), state=inner)
            added = self.experts[number](_picked(x, at), here, self.causal)
            if around.state is not None and inner is not None:
                around.state.update({f"{name}{number}": tensor for name, tensor in inner.items()})
            weight = given[..., number].gather(1, at)
            if real is not None:
                weight = weight * real
            y = y.scatter_add(1, at[..., None].expand_as(added), (added * weight[..., None]).to(y.dtype))
        return y if self.out_bias is None else y + self.out_bias.to(y.dtype)

    def _gathered(self, took: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """For each group that runs: its number, its positions (B x n) in order, and which of these are none (B x n)."""
        counts = took.sum(1)  # B x E
        for number, most in enumerate(counts.amax(0).tolist()):
            if most:
                at = (~took[..., number]).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
                whole = int(counts[:, number].amin()) == most
                yield number, at, None if whole else took[..., number].gather(1, at)

    @property
    def flops(self) -> int:
        router = 2 * self.router.weight.numel()
        return router + (super().flops - router) * self.active // len(self.experts)

    def mixing_flops(self, length: int) -> int:
        count = -(-length * self.active // len(self.experts))
        return 4 * count * count * self.head_numbers


def check_head_groups(key_value_heads: int, experts: int, active: int) -> None:
    """TransectError where heads cannot be shared out among so many groups."""
    if key_value_heads % experts:
        raise TransectError(
            f"{key_value_heads} heads of keys and values cannot be shared out among {experts} groups of heads: choose "
            f"a number that divides them"
        )
    if active > experts:
        raise TransectError(f"{active} of {experts} groups of heads cannot be run: choose at most {experts}")


def _inner(state: dict[str, Tensor] | None, number: int) -> dict[str, Tensor] | None:
    """One group's part of the state."""
    if state is None:
        return None
    return {name: state[f"{name}{number}"] for name in ("k", "v", "real") if f"{name}{number}" in state}


def _picked(x: Tensor, at: Tensor) -> Tensor:
    """Some of the positions: (B x N x d) -> (B x n x d)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _picked_rotary(rotary: tuple[Tensor, Tensor] | None, at: Tensor) -> tuple[Tensor, Tensor] | None:
    if rotary is None:
        return None
    cos, sin = (_picked(angles.expand(len(at), *angles.shape[1:]), at) for angles in rotary)
    return cos, sin
