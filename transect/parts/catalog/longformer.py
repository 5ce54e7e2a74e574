"""Longformer (Beltagy et al. 2020, arXiv:2004.05150): a window, and a few positions that see and are seen by all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..sparse import Few, SparseAttention, Window, blocked, everywhere, in_blocks, positions_of, real_at, surrounding


class Longformer(SparseAttention):
    """Each position sees those less than `window` away and the first few, the global ones; these see all.

    The global positions use the same matrices as the others, where the authors' have their own.

    window: how far, the position itself included.
    global_tokens: how many global positions there are at the beginning.
    """

    kind = "mixer.longformer"
    paper = "arXiv:2004.05150"
    limit = "with a window of all positions, or all of them global, it is softmax attention"
    cost = "N"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, window: Window = 64, global_tokens: Few = 1,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        self.window, self.global_tokens = window, global_tokens
        self.random, self.seed = 0, 0

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        near = ((at - keys).abs() < self.window) | (keys < self.global_tokens) | (at < self.global_tokens)
        if not self.random:
            return near
        blocks = -(-count // self.window)
        drawn = random_blocks(blocks, self.random, self.causal, self.seed, at.device)
        block = keys.div(self.window, rounding_mode="floor")
        row = at.div(self.window, rounding_mode="floor").clamp(0, blocks - 1)
        return near | (drawn[row] == block[..., None]).any(-1)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count = q.shape[2]
        size, few = min(self.window, count), min(self.global_tokens, count)  # of what is there
        ahead = 0 if self.causal else size
        at = positions_of(count, size, 0, 0, q.device)  # blocks x window
        beside = positions_of(count, size, size, ahead, q.device)
        keys, counted = [beside, torch.arange(few, device=q.device).expand(len(at), -1)], [beside >= few]
        counted.append(torch.ones_like(keys[1], dtype=torch.bool))
        from_k, from_v = ([surrounding(x, size, size, ahead), everywhere(x[:, :, :few], len(at))] for x in (k, v))
        if self.random:
            drawn = random_blocks(len(at), self.random, self.causal, self.seed, q.device)
            again = (drawn[:, :, None] == drawn[:, None]).tril(-1).any(-1)  # blocks x random: drawn before
            chosen = at[drawn].flatten(1)
            for pieces, x in ((from_k, k), (from_v, v)):
                pieces.append(in_blocks(x, size)[:, :, drawn].flatten(3, 4))
            keys.append(chosen)
            counted.append(~again.repeat_interleave(size, dim=1) & (chosen >= few))
        at_keys = torch.cat(keys, dim=1)
        allowed = torch.cat(counted, dim=1) & real_at(real, at_keys)
        near = beside.shape[1] + few

        def seen(rows: Tensor, columns: Tensor) -> Tensor:
            """Of what is gathered: in the window, global, or drawn and not in the window."""
            number = torch.arange(columns.shape[-1], device=q.device)
            close = (rows - columns).abs() < size
            return (close & (number < near) | ~close & (number >= near) | (columns < few)) & self._behind(rows, columns)

        y = blocked(q, torch.cat(from_k, dim=3), torch.cat(from_v, dim=3), at, at_keys, allowed, seen)[:, :, :count]
        if self.causal or not few:
            return y
        whole = functional.scaled_dot_product_attention(q[:, :, :few], k, v, attn_mask=real[:, None, None])
        return torch.cat([whole, y[:, :, few:]], dim=2)

    def mixing_flops(self, length: int) -> int:
        window, few = min(self.window, length), min(self.global_tokens, length)
        keys = (2 if self.causal else 3) * window + few + self.random * window
        return 4 * length * (keys + (0 if self.causal else few)) * self._inner


def random_blocks(blocks: int, each: int, causal: bool, seed: int, device: torch.device) -> Tensor:
    """Numbers of blocks drawn for each block (blocks x each); of earlier ones if causal, where there are any.

    An integer hash of the numbers: the draw for a block does not depend on how many there are, except in a model that
    sees all of them.
    """
    number = torch.arange(blocks, device=device)
    drawn = number[:, None] * 0x9E37 + torch.arange(each, device=device) * 0x85EBCA + seed % 2**31 * 0x27D4 + 1
    for _ in range(2):
        drawn = ((drawn >> 16) ^ drawn) * 0x45D9F3B & 0xFFFFFFFF
    most = (number - 1).clamp(min=1) if causal else torch.full_like(number, max(blocks, 1))
    return ((drawn >> 16) ^ drawn) % most[:, None]
