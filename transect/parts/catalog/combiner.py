"""Combiner (Ren et al., NeurIPS 2021, arXiv:2107.05768): attention to all positions, to most of them by regions.

A query's positions are split into some that it sees directly and regions Ω (Section 3). One softmax is taken over
q·k_j for the first and q·k_Ω for the second; a region's share is divided among its positions by a softmax of
q_Ω·k_j, which no query enters, so that its value is computed once. k_Ω and q_Ω are the largest of each channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..attention import Attention
from ..part import Around
from ..precision import wide

# What a query may choose from: logits (B x h x N x n), -inf where it may not, and what is read with such weights.
Choices = tuple[Tensor, Callable[[Tensor], Tensor]]


class Combiner(Attention):
    """Softmax attention in which regions of positions are each seen as one, with the matrices of softmax attention.

    pattern: `fixed`, the own span position by position and every other span as a region; `logsparse`, the position
        itself and behind it blocks of 1, 2, 4, ... positions (the set bits of its number); with the positions as rows
        of a span each, `vertical`, the own row and column and every other column above as a region, `horizontal`, the
        rows above on both sides of the own column, or `mixture`, both. All but `fixed` are causal.
    span: positions in a span; 0 for the root of the model's length, or 16 if it has none.
    """

    kind = "mixer.combiner"
    paper = "arXiv:2107.05768"
    limit = "fixed, with one span of all positions or spans of one, it is softmax attention"
    cost = "N√N with spans of √N; N log N for logsparse"

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, length: int, causal: bool, *,
        pattern: Literal["fixed", "logsparse", "vertical", "horizontal", "mixture"] = "fixed",
        span: Annotated[int, Range(0, 2**20)] = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, key_value_heads=key_value_heads)
        if not causal and pattern != "fixed":
            raise TransectError(
                f"combiner's pattern {pattern} is causal, and this model is not: take the pattern fixed"
            )
        self.pattern, self.span = pattern, span or round(math.sqrt(length)) or 16

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        k, v = self.for_queries(k, v)
        real = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if around.real is None else around.real
        return combined(q, k, v, real, self.pattern, self.span, self.causal)

    def mixing_flops(self, length: int) -> int:
        rows = -(-length // self.span)
        seen = {
            "fixed": self.span + rows + 1,
            "logsparse": 2 * max(1, length.bit_length()),
            "vertical": 2 * self.span + 2 * rows,
            "horizontal": self.span + 3 * rows + 2 * self.span,
            "mixture": 4 * self.span + 4 * rows,
        }[self.pattern]
        return 4 * length * seen * self.heads * self.head_size


def combined(q: Tensor, k: Tensor, v: Tensor, real: Tensor, pattern: str, span: int, causal: bool) -> Tensor:
    """Outputs (B x h x N x d_v) for q, k (B x h x N x d) and v (B x h x N x d_v), in float32 or wider.

    real: (B x N), false at padding, which no other position sees. pattern, span: the part's.
    """
    count = q.shape[2]
    if pattern == "logsparse":
        whole = 1 << (count - 1).bit_length()
    else:
        span = min(span, count)
        whole = -(-count // span) * span
    q, k, v = (functional.pad(one, (0, 0, 0, whole - count)) for one in (q, k, v))
    q = q * q.shape[-1] ** -0.5  # also in q_Ω, since the largest scales with it
    real = functional.pad(real, (0, whole - count))
    if pattern == "logsparse":
        choices = [_itself(q, k, v), *_blocks_behind(q, k, v, real)]
    else:
        q, k, v = (one.unflatten(2, (-1, span)) for one in (q, k, v))  # B x h x rows x span x d
        real = real.unflatten(1, (-1, span))[:, None]  # B x 1 x rows x span
        choices = [_own_row(q, k, v, real, causal)]
        if pattern == "fixed":
            choices += [_other_spans(q, k, v, real, causal)]
        else:
            choices += [_own_column(q, k, v, real)]
        if pattern in ("vertical", "mixture"):
            choices += [_columns_above(q, k, v, real)]
        if pattern in ("horizontal", "mixture"):
            choices += [_rows_above(q, k, v, real, left) for left in (True, False)]
    return _chosen(choices)[:, :, :count]


def _chosen(choices: list[Choices]) -> Tensor:
    """What is read with one softmax over all logits."""
    logits = [one for one, _ in choices]
    weights = torch.cat([one if one.dtype == torch.float64 else one.float() for one in logits], dim=-1).softmax(-1)
    parts = weights.split([one.shape[-1] for one in logits], dim=-1)
    outputs = [read(part) for part, (_, read) in zip(parts, choices, strict=True)]
    return torch.stack(outputs).sum(0)


def _hidden(logits: Tensor, seen: Tensor) -> Tensor:
    return logits.masked_fill(~seen, float("-inf"))


def _largest(x: Tensor, real: Tensor) -> Tensor:
    """The largest real value of each channel over dimension -2, kept; 0 where there is none. real: as x without d."""
    most = _hidden(x, real[..., None]).amax(-2, keepdim=True)
    return most.masked_fill(most == float("-inf"), 0.0)


def _largest_so_far(x: Tensor, real: Tensor, dim: int) -> Tensor:
    """The largest real value of each channel up to each place of a dimension; 0 where there is none yet."""
    most = _hidden(x, real[..., None]).cummax(dim).values
    return most.masked_fill(most == float("-inf"), 0.0)


def _shares(logits: Tensor, seen: Tensor) -> Tensor:
    """A softmax over what is seen; 0 for a query that sees nothing."""
    logits = wide(logits)
    nothing = ~seen.any(-1, keepdim=True)
    return _hidden(logits, seen | nothing).softmax(-1).masked_fill(nothing, 0.0)


def _itself(q: Tensor, k: Tensor, v: Tensor) -> Choices:
    return (q * k).sum(-1, keepdim=True), lambda weights: weights * v


def _own_row(q: Tensor, k: Tensor, v: Tensor, real: Tensor, causal: bool) -> Choices:
    """The own span (up to the position itself if causal); it always sees itself."""
    span = q.shape[3]
    own = torch.eye(span, dtype=torch.bool, device=q.device)
    seen = real[:, :, :, None, :] & (own.new_ones(span, span).tril() if causal else own.new_ones(span, span)) | own
    logits = _hidden(q @ k.mT, seen).flatten(2, 3)
    return logits, lambda weights: (weights.unflatten(2, (-1, span)).to(v) @ v).flatten(2, 3)


def _other_spans(q: Tensor, k: Tensor, v: Tensor, real: Tensor, causal: bool) -> Choices:
    """Every other span as a region; if causal, those before the own."""
    shares = _shares(_largest(q, real) @ k.mT, real[..., None, :])  # B x h x rows x 1 x span
    values, keys = (shares.to(v) @ v).squeeze(3), _largest(k, real).squeeze(3)  # B x h x rows x d
    rows, span = q.shape[2:4]
    apart = torch.arange(rows, device=q.device)[:, None] - torch.arange(rows, device=q.device)
    seen = (apart > 0 if causal else apart != 0) & real.any(-1)[:, :, None]  # B x 1 x rows x regions
    logits = (q.flatten(2, 3) @ keys.mT).unflatten(2, (-1, span))
    return _hidden(logits, seen[:, :, :, None]).flatten(2, 3), lambda weights: weights.to(values) @ values


def _blocks_behind(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> list[Choices]:
    """For each bit of a position's number that is set, the block of so many positions before the bits below."""
    choices = []
    for level in range((q.shape[2] - 1).bit_length()):
        size = 1 << level
        pairs_q, pairs_k, pairs_v = (one.unflatten(2, (-1, 2, size)) for one in (q, k, v))  # ... 2 x size x d
        there = real.unflatten(1, (-1, 2, size))[:, None, :, 0]  # B x 1 x pairs x size
        first_k = pairs_k[:, :, :, 0]
        shares = _shares(_largest(pairs_q[:, :, :, 0], there) @ first_k.mT, there[..., None, :])
        value = shares.to(v) @ pairs_v[:, :, :, 0]  # B x h x pairs x 1 x d
        logits = pairs_q[:, :, :, 1] @ _largest(first_k, there).mT  # of each second block to the first
        logits = _hidden(logits, there.any(-1)[..., None, None])
        logits = torch.stack([torch.full_like(logits, float("-inf")), logits], dim=3).flatten(2, 4)  # B x h x N x 1

        def read(weights: Tensor, value: Tensor = value, size: int = size) -> Tensor:
            return (weights.unflatten(2, (-1, 2, size)) * value[:, :, :, None]).flatten(2, 4)

        choices.append((logits, read))
    return choices


def _above(rows: int, device: torch.device) -> Tensor:
    """Which row is above which (rows x rows)."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril(-1)


def _per_column(logits: Tensor) -> Tensor:
    """Logits made column by column (B x h x span x rows x n), by position (B x h x N x n)."""
    return logits.transpose(2, 3).flatten(2, 3)


def _own_column(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Choices:
    """The own column, in rows above."""
    q, k, v, there = (
        q.transpose(2, 3),
        k.transpose(2, 3),
        v.transpose(2, 3),
        real.transpose(2, 3),
    )  # B x h x span x rows
    logits = _hidden(q @ k.mT, _above(q.shape[3], q.device) & there[..., None, :])
    span = q.shape[2]
    return _per_column(logits), lambda weights: _per_column(weights.unflatten(2, (-1, span)).transpose(2, 3).to(v) @ v)


def _columns_above(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Choices:
    """Every other column, in rows above the own, as a region."""
    rows, span = q.shape[2:4]
    above = _above(rows, q.device)
    pooled_q, pooled_k = (_largest_so_far(one, real, 2).roll(1, 2) for one in (q, k))  # up to the row above
    seen = above & real.transpose(2, 3)[..., None, :]  # B x 1 x span x rows x rows
    shares = _shares(pooled_q.transpose(2, 3) @ k.transpose(2, 3).mT, seen)
    values = (shares.to(v) @ v.transpose(2, 3)).transpose(2, 3)  # B x h x rows x span x d: of the column above a place
    other = ~torch.eye(span, dtype=torch.bool, device=q.device)
    there = seen.any(-1).transpose(2, 3)[..., None, :]  # B x 1 x rows x 1 x columns
    logits = _hidden(q @ pooled_k.mT, other & there).flatten(2, 3)
    return logits, lambda weights: (weights.unflatten(2, (-1, span)).to(values) @ values).flatten(2, 3)


def _rows_above(q: Tensor, k: Tensor, v: Tensor, real: Tensor, left: bool) -> Choices:
    """Of every row above, the part left or right of the own column as a region."""
    rows, span = q.shape[2:4]
    sides = (lambda one: one) if left else (lambda one: one.flip(3))
    pooled_q, pooled_k = (sides(_largest_so_far(sides(one), sides(real), 3).roll(1, 3)) for one in (q, k))
    side = _above(span, q.device) if left else _above(span, q.device).mT  # column -> columns on that side
    seen = side & real[..., None, :]  # B x 1 x rows x span x span
    values = _shares(pooled_q @ k.mT, seen).to(v) @ v  # B x h x rows x span x d: of the row on that side of a place
    pooled_k, values = pooled_k.transpose(2, 3), values.transpose(2, 3)  # B x h x span x rows x d
    there = seen.any(-1).transpose(2, 3)[..., None, :]
    logits = _hidden(q.transpose(2, 3) @ pooled_k.mT, _above(rows, q.device) & there)
    return _per_column(logits), lambda weights: _per_column(
        weights.unflatten(2, (-1, span)).transpose(2, 3).to(values) @ values
    )
