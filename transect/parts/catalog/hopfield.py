"""Modern Hopfield networks (Ramsauer et al., ICLR 2021, arXiv:2008.02217): attention as steps of an associative memory.

A state ξ goes to X softmax(β Xᵀ ξ) for stored patterns X (d x N), a step that never raises the energy
E(ξ) = -lse(β, Xᵀ ξ) + ξᵀ ξ / 2 + log N / β + M² / 2, with M the largest norm of a pattern; it is ξ - ∇E(ξ).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ..attention import Attention, seen_by, with_past
from ..part import Around, MLPPart
from ..rotary import rotated

Updates = Annotated[int, Range(0, 64)]
Beta = Annotated[float, Range(0)]


def energy(state: Tensor, patterns: Tensor, beta: float) -> Tensor:
    """E of states (... x d) for patterns (N x d), in [0, 2 M²] where no state is longer than M."""
    scores = state @ patterns.T
    constant = torch.log(torch.tensor(float(len(patterns)))) / beta + patterns.norm(dim=1).max() ** 2 / 2
    return -torch.logsumexp(beta * scores, dim=-1) / beta + state.square().sum(-1) / 2 + constant


def retrieved(state: Tensor, patterns: Tensor, beta: Tensor | float, updates: int, mask: Tensor | None) -> Tensor:
    """States (... x S x d) after so many steps over patterns (... x N x d). mask: which pattern a state may see."""
    for _ in range(updates):
        state = association(state, patterns, beta, mask) @ patterns
    return state


def association(state: Tensor, patterns: Tensor, beta: Tensor | float, mask: Tensor | None) -> Tensor:
    """softmax(β ξᵀ X) (... x S x N)."""
    scores = beta * (state @ patterns.transpose(-1, -2))
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


class Hopfield(Attention):
    """Queries are states, keys are patterns: after `updates` steps towards them, values are read by one more softmax.

    As in the authors' layer, a LayerNorm stands in front of q, k and v each, and weights begin as N(0, 0.02²). The
    steps stay in the space of the keys; values and output are used once. The model's rotary positions turn both.

    updates: steps before the values are read; 0 is attention.
    beta: inverse temperature; 0 for 1 / sqrt(head size).
    """

    kind = "mixer.hopfield"
    paper = "arXiv:2008.02217"
    limit = "without updates it is softmax attention behind a LayerNorm of its own"
    cost = "N²"
    recurrent = True  # though its state grows: keys and values
    roles = {"o": "o_proj"}

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, updates: Updates = 1, beta: Beta = 0.0
    ) -> None:
        super().__init__(width, heads, head_size, causal, bias=True)
        self.updates, self.beta = updates, beta or head_size**-0.5
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(width) for _ in range(3))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        maps = ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj), (self.v_norm, self.v_proj))
        q, k, v = (self.by_heads(linear(norm(x))) for norm, linear in maps)
        q, k, real = rotated(q, around.rotary), rotated(k, around.rotary), around.real
        if around.state is not None:
            k, v, real = with_past(k, v, real, around.state)
        mask = seen_by(q.shape[2], k.shape[2], self.causal, real, x.device)
        causal = mask is None and self.causal and q.shape[2] == k.shape[2]
        for stored in (*[k] * self.updates, v):  # a step is attention whose values are the keys
            q = functional.scaled_dot_product_attention(q, k, stored, attn_mask=mask, is_causal=causal, scale=self.beta)
        return self.put_out(q, x)

    def mixing_flops(self, length: int) -> int:
        return (1 + self.updates) * 4 * length * length * self.heads * self.head_size


class HopfieldLayer(MLPPart):
    """Trained patterns that each position looks up: a softmax over `neurons` prototypes in the MLP's place, by heads.

    updates: steps towards the patterns before the values are read.
    beta: inverse temperature; 0 for 1 / sqrt(head size).
    """

    kind = "mlp.hopfield"
    paper = "arXiv:2008.02217"
    limit = "none: the hidden units compete"
    roles = {"down": "o_proj"}

    def __init__(self, width: int, heads: int, neurons: int, *, updates: Updates = 0, beta: Beta = 0.0) -> None:
        super().__init__()
        self.heads, self.updates = heads, updates
        self.beta = beta or (width // heads) ** -0.5
        inner = width // heads * heads
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner)
        self.keys = nn.Parameter(torch.randn(neurons, inner) * 0.02)
        self.values = nn.Parameter(torch.randn(neurons, inner) * 0.02)
        self.o_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(self.norm(x)).flatten(0, -2)
        q, keys, values = (
            one.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for one in (q, self.keys, self.values)
        )  # 1 x heads x positions (or neurons) x size: every position of the batch reads the same patterns
        for stored in (*[keys] * self.updates, values):
            q = functional.scaled_dot_product_attention(q, keys, stored, scale=self.beta)
        return self.o_proj(q[0].transpose(0, 1).flatten(1)).view_as(x)

    @property
    def flops(self) -> int:
        return super().flops + 4 * (1 + self.updates) * self.keys.numel()


class HopfieldPooling(nn.Module):
    """A fixed number of vectors from a set of any size: trained states, whose patterns are the set's members.

    width: of the members and of what comes out. quantity: how many vectors come out. The set: (B x N x width), with
    `real` (B x N) false where there is no member. Out: (B x quantity x width).
    """

    def __init__(self, width: int, quantity: int = 1, beta: float | None = None, updates: int = 0) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.randn(quantity, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(3))
        self.beta, self.updates = beta or width**-0.5, updates

    def forward(self, members: Tensor, real: Tensor | None = None) -> Tensor:
        k, v = self.k_proj(self.norm(members)), self.v_proj(self.norm(members))
        mask = None if real is None else real[:, None, :]
        states = retrieved(self.states.expand(len(members), -1, -1), k, self.beta, self.updates, mask)
        return self.o_proj(association(states, k, self.beta, mask).nan_to_num() @ v)
