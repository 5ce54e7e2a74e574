"""Attention within a window of positions (Longformer's, arXiv:2004.05150, without global positions)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ..attention import Attention
from ..part import Around


class Local(Attention):
    """Softmax attention of each position to those less than `window` away, behind it or, if not causal, on both sides.

    Computed in blocks of the window, so that time and memory are O(N window). In generation the last window of keys
    and values is kept, and no more.

    window: how far, the position itself included.
    """

    kind = "mixer.local"
    paper = "arXiv:2004.05150"
    limit = "with a window of all positions it is softmax attention"
    cost = "N"
    recurrent = True

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, window: Annotated[int, Range(1, 2**20)] = 64
    ) -> None:
        super().__init__(width, heads, head_size, causal)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        return windowed(q, *with_window_before(k, v, around, self.window), self.causal)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * (2 if self.causal else 3) * min(self.window, length) * self.heads * self.head_size


def with_window_before(k: Tensor, v: Tensor, around: Around, window: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Keys and values with the window before them in front, which of them are real, and how long the window then is.

    It is no longer than there are positions. In generation the last window is kept.
    """
    real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if around.real is None else around.real
    count, state = k.shape[2], around.state
    if state is not None:
        if "k" in state:
            k, v = (torch.cat([old, new], dim=2) for old, new in ((state["k"], k), (state["v"], v)))
            real = torch.cat([state["real"], real], dim=1)
        state |= {"k": k[:, :, -window:], "v": v[:, :, -window:], "real": real[:, -window:]}
    window = min(window, k.shape[2])
    front = window + count - k.shape[2]  # zeros for what is not there
    k, v = (functional.pad(one, (0, 0, front, 0)) for one in (k, v))  # cuts where it is below 0
    return k, v, functional.pad(real, (front, 0)), window


def windowed(q: Tensor, k: Tensor, v: Tensor, real: Tensor, window: int, causal: bool) -> Tensor:
    """Attention of each of N queries to keys less than `window` away (B x heads x N x size).

    k, v: of N + window positions, the window before the first query in front. real: which of these (B x N + window).
    A query that may see nothing sees itself.
    """
    count, blocks = q.shape[2], -(-q.shape[2] // window)
    if count == 1:  # in generation: the first of what is in front of it is a whole window away
        mask = real[:, None, None, 1:] | (torch.arange(1, window + 1, device=q.device) == window)
        return functional.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:], attn_mask=mask)
    behind = blocks * window - count  # to whole blocks
    ahead = 0 if causal else window
    wide = (2 if causal else 3) * window
    q = functional.pad(q, (0, 0, 0, behind)).unflatten(2, (blocks, window))
    k, v = (
        functional.pad(one, (0, 0, 0, behind + ahead)).unfold(2, wide, window).transpose(-1, -2) for one in (k, v)
    )  # B x heads x blocks x wide x size
    real = functional.pad(real, (0, behind + ahead)).unfold(1, wide, window)  # B x blocks x wide
    apart = torch.arange(window, device=q.device)[:, None] + window - torch.arange(wide, device=q.device)
    near = (apart >= 0) & (apart < window) if causal else apart.abs() < window
    mask = (near & real[:, :, None, :]) | (apart == 0)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return y.flatten(2, 3)[:, :, :count]
