"""UltraMemV2: a large memory of keys and values beside every MLP, of which each position reads a few slots (Huang et
al., ICLR 2026, arXiv:2508.18756; UltraMem: arXiv:2411.12364).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ....errors import TransectError
from ...part import BlockPart, Inside
from ...precision import wide
from ...sharing import SharingPart
from .retrieval import best_slots, direction

TUCKER_RANK = 2  # r of the Tucker cores
TUCKER_HEADS = 2  # cores, each with its part of the value
STARTING_INPUTS = 256  # inputs by which the start is found


def grid_side(side: int, layers: int, share: float) -> int:
    """Rows of the grid that a layer looks at, where each of so many adds side² slots and reads a share of all."""
    return max(side, math.isqrt(int(side * side * layers * share + 1e-9)))


class Pool(nn.Module):
    """The slots of all layers: pre-values (slots x D_p), if they have any, and values (heads, one after the other, x
    slots, x D_v / 2)."""

    def __init__(self, slots: int, pre_size: int, value_size: int) -> None:
        super().__init__()
        self.pre = nn.Parameter(torch.randn(slots, pre_size)) if pre_size else None  # P
        self.values = nn.Parameter(torch.randn(TUCKER_HEADS * slots, value_size // TUCKER_HEADS))  # V


class UltraMem(SharingPart, BlockPart):
    """A memory beside the block's MLP: x + block's additions + Mem(u), with u the input of its MLP.

    Of side² slots for every layer, in one pool for all, `top` are read: Mem(u) = W_o Σ_k s_k <W_p u, P_k> V_k, where
    slots are found and scored by `best_slots` and each half of a value has the score of a core of its own. There is no
    softmax, and no function. Of plain vectors, as many numbers in a slot, Mem(u) = W_o Σ_k s_k V_k instead. Where the
    MLP is no single module, u is the block's input, divided by its RMS.
    A dense AdamW's weight decay also acts on slots that are not read.

    side: of a layer's own part of the pool: it adds side² slots.
    top: slots, and also rows and columns, that a position looks at, at most 128 and no more than there are.
    share: of the pool that a layer reads, as a window from its own part on, around the end if need be; at least its
        own part, which is all at 1 / layers or less.
    key: width of a key, D_k; 0 is half of the stream's.
    queries: each rank has its own row and column query, as in the paper, or both ranks share one, as in its code.
    values: neurons, one linear neuron in each slot, or vectors, plain ones as in UltraMem before it.
    start: zero is W_o = 0, so that the block does what it did; paper gives the memory the variance of an MLP.
    """

    kind = "block.ultramem-v2"
    paper = "arXiv:2508.18756"
    limit = "with W_o = 0, its start, or values of zero it is the block"

    uv: Tensor
    shuffle: Tensor

    def __init__(
        self, width: int, neurons: int, place: int, places: int, first: int, *,
        side: Annotated[int, Range(2, 4096)] = 64, top: Annotated[int, Range(1, 128)] = 16,
        share: Annotated[float, Range(0, 1, above=True)] = 0.5, key: Annotated[int, Range(0, 2**16)] = 0,
        queries: Literal["each", "shared"] = "each", values: Literal["neurons", "vectors"] = "neurons",
        start: Literal["zero", "paper"] = "zero",
    ) -> None:  # fmt: skip
        super().__init__()
        own = side * side
        self.slots = own * places
        self.side = grid_side(side, places, share)
        if top > self.side:
            raise TransectError(f"top={top} of {self.side} rows cannot be kept: choose a smaller top or a larger side")
        self.top, self.offset = top, place * own
        key = key or width // 2
        # D_p : D_v = 1 : 3, together half of the stream's width (Section 4), which plain vectors have for themselves
        plain = values == "vectors"
        self.pre_size = 0 if plain else max(1, width // 8)
        self.value_size = TUCKER_HEADS * max(1, width // 4 if plain else 3 * width // 16)
        self.queries = TUCKER_RANK if queries == "each" else 1
        self.share(place, first)
        self.query_proj = nn.Linear(width, 2 * self.queries * key, bias=False)
        self.pre_proj = nn.Linear(width, self.pre_size, bias=False) if self.pre_size else None
        self.out_proj = nn.Linear(self.value_size, width, bias=False)
        self.keys = nn.Parameter(torch.randn(2, TUCKER_RANK, self.side, key) / math.sqrt(key))  # of rows and columns
        self.query_gain = nn.Parameter(torch.full((key,), key**-0.4))
        self.key_gain = nn.Parameter(torch.full((key,), key**-0.4))
        self.cores = nn.Parameter(torch.rand(TUCKER_HEADS, TUCKER_RANK, TUCKER_RANK))
        self.register_buffer("uv", direction(self.cores, torch.ones(2, TUCKER_RANK)) if not self.cores.is_meta else
                             torch.empty(2, TUCKER_RANK))  # fmt: skip
        self.register_buffer("shuffle", torch.randperm(self.side**2))
        self._begin(width, neurons, places, key, start)

    @torch.no_grad()
    def _begin(self, width: int, neurons: int, layers: int, key: int, start: str) -> None:
        """Numbers with which the mean score of what is read is 1 and Mem has the variance of an MLP (Appendix A)."""
        nn.init.normal_(self.query_proj.weight, std=key**-0.5)
        for linear in (self.pre_proj, self.out_proj):
            if linear is not None:
                nn.init.normal_(linear.weight, std=math.sqrt(2 / (5 * width)))
        if not self.keys.is_meta:
            scores = self.looked_up(torch.randn(STARTING_INPUTS, width))[1]
            for gain in (self.query_gain, self.key_gain):  # either is in both factors of a score
                gain /= scores.mean().clamp_min(1e-6) ** 0.25
            spread = float(scores.var() / scores.mean().clamp_min(1e-6).square())  # σ_s² once the mean is 1
            if self.owns_bank:
                # σ_V, from 0.4 (1 + σ_s²) σ_V² top D_v / h = 0.064 (neurons / h) / 2L, the variance of an MLP, of plain
                # vectors; that of neurons has 0.4 σ_V² D_p on the left besides
                squared = 0.08 * neurons / (self.top * (1 + spread) * self.value_size * layers)
                if self.bank.pre is not None:
                    squared = math.sqrt(2.5 * squared / self.pre_size)
                for values in self.bank.parameters():
                    values *= math.sqrt(squared)
        if start == "zero":
            nn.init.zeros_(self.out_proj.weight)

    def new_bank(self) -> Pool:
        return Pool(self.slots, self.pre_size, self.value_size)

    def looked_up(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of this layer's grid that are read (T x top) and their scores (T x heads x top). u: (T x d)."""
        q = self.query_proj(u).unflatten(-1, (2, self.queries, -1))  # T x 2 x ranks x D_k
        q, keys = _normed(q, self.query_gain), _normed(self.keys, self.key_gain)
        scores = torch.einsum("tark,arnk->tarn", q.expand(-1, -1, TUCKER_RANK, -1), keys)
        cores = self.cores.to(scores.dtype)
        uv = direction(cores, self.uv)
        if self.training:
            self.uv.copy_(uv)
        return best_slots(scores[:, 0], scores[:, 1], cores, uv.to(scores.dtype), self.top)

    def memory(self, u: Tensor) -> Tensor:
        """Mem(u): (..., d) -> (..., d)."""
        flat = u.flatten(0, -2)
        slots, scores = self.looked_up(flat)
        slots = (self.shuffle[slots] + self.offset) % self.slots  # of the pool
        pool = self.bank
        if self.pre_proj is not None:
            given = self.pre_proj(flat).to(pool.pre.dtype)
            scores = scores * torch.einsum("tp,tkp->tk", given, functional.embedding(slots, pool.pre))[:, None]
        rows = torch.stack([slots + a * self.slots for a in range(TUCKER_HEADS)], dim=1)  # T x heads x top
        weights = scores.to(pool.values.dtype).flatten(0, 1)
        read = functional.embedding_bag(rows.flatten(0, 1), pool.values, mode="sum", per_sample_weights=weights)
        return self.out_proj(read.view(len(flat), -1).to(u.dtype)).view(u.shape)

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        """What the block makes of the stream (B x T x d), and Mem(u)."""
        seen: list[Tensor] = []
        if not isinstance(inside.mlp, nn.Module):
            return inside.block(x) + self.memory(functional.rms_norm(x, x.shape[-1:]))
        hook = inside.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            y = inside.block(x)
        finally:
            hook.remove()
        return y + self.memory(seen[-1]).view(y.shape)

    @property
    def flops(self) -> int:
        """Operations for one position: matrices, scores, the grid, and what is read."""
        key = self.keys.shape[-1]
        scores = 2 * 2 * TUCKER_RANK * self.side * (key + 1)
        grid = 2 * TUCKER_HEADS * TUCKER_RANK * self.top * (TUCKER_RANK + self.top)
        return super().flops + scores + grid + 2 * self.top * (self.pre_size + self.value_size)


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    """x over its RMS in the last dimension, times the gain; in float32 or wider."""
    x = wide(x)
    return functional.rms_norm(x, x.shape[-1:]) * gain.to(x.dtype)
