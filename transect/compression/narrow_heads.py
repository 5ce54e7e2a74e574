"""Attention with narrower heads: whether a block's heads can be, what that stores, and putting it in place.

The model's own attention still sees heads of full size, with zeros where channels are gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..anatomy import Attention, Matrix
from ..operators import Operator
from ..operators.scattered import LeadingColumns, LeadingRows, ScatteredRows, position_dtype


def has_regular_heads(attention: Attention) -> bool:
    """Whether q, k, v and o consist of whole heads of one size, with equally many query heads for each key head."""
    q, k, v, size = attention.q, attention.k, attention.v, attention.head_size
    fits = q.shape[0] % size == 0 and k.shape[0] % size == 0 and k.shape == v.shape
    return fits and attention.heads % attention.key_value_heads == 0 and attention.o.shape[1] == q.shape[0]


def queries_are_keys(attention: Attention) -> bool:
    """Whether both are one tensor."""
    return attention.q.fused is None and attention.q.module.weight is attention.k.module.weight


def are_normalised(attention: Attention) -> bool:
    """Whether a norm mixes a head's channels after the projection, so that none can be left out exactly."""
    return attention.q_norm is not None or attention.k_norm is not None


def query_key_bytes(attention: Attention, channels: int) -> int:
    """Of q and k with so many channels a head, the positions of the channels included where they are stored."""
    total = 0
    for matrix in (attention.q, attention.k):
        rows = matrix.shape[0] // attention.head_size * channels
        total += rows * matrix.shape[1] * matrix.module.weight.element_size()
        if channels < attention.head_size and attention.block.rotary_width:
            total += rows * position_dtype(matrix.shape[0]).itemsize
    return total


def value_bytes(attention: Attention, values: int) -> int:
    """Of v and o with so many values a head."""
    matrices = (attention.v, attention.o)
    whole = sum(m.shape[0] * m.shape[1] * m.module.weight.element_size() for m in matrices)
    return whole // attention.head_size * values


def keep_channels(attention: Attention, channels: Tensor) -> None:
    """Keep these channels of queries and keys, in place. channels: (key heads x count), ascending; a group shares them.

    Under rotary positions they stay where they are. Without rotation a head's channels have no order, so they move to
    the front, and no positions are stored.
    """
    size, count = attention.head_size, channels.shape[1]
    rotary = attention.block.rotary_width
    for matrix in (attention.q, attention.k):
        heads = matrix.shape[0] // size
        starts = torch.arange(heads, device=channels.device)[:, None] * size
        of_heads = channels.repeat_interleave(heads // len(channels), dim=0)
        kept = (starts + of_heads).flatten()
        places = kept if rotary else (starts + torch.arange(count, device=channels.device)).flatten()
        weight, bias = matrix.weight, matrix.bias
        if bias is not None:
            bias = torch.zeros_like(bias).index_copy(0, places, bias[kept])
        if rotary:
            operator = ScatteredRows.from_rows(weight[kept], places, matrix.shape[0], bias)
        else:
            operator = LeadingRows.from_rows(weight[kept], heads, matrix.shape[0], bias)
        _put(matrix, operator)


def put_values(
    attention: Attention, rows: Tensor, columns: Tensor, value_bias: Tensor | None, output_bias: Tensor | None
) -> None:
    """Put narrower values and outputs in place, biases included.

    rows: V' (key/value heads · count x d_in). columns: O' (d x heads · count). value_bias: full size (d_v), or None.
    output_bias: (d), or None.
    """
    v, o = attention.v, attention.o
    heads, key_heads = attention.heads, attention.key_value_heads
    _put(v, LeadingRows.from_rows(rows, key_heads, v.shape[0], value_bias))
    _put(o, LeadingColumns.from_columns(columns, heads, o.shape[1], output_bias))


def _put(matrix: Matrix, operator: Operator) -> None:
    """Like `frame.put`, but the operator brings its own bias."""
    like = matrix.module.weight
    matrix.replace(operator.to(device=like.device, dtype=like.dtype).requires_grad_(like.requires_grad))
