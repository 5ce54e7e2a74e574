"""Which slots of a grid are read: scores of rows and columns, put together by Tucker cores (Section 3 of UltraMem,
arXiv:2411.12364).

The slot (i, j) of an n x n grid has for each core C_a the score s_row[:, i]ᵀ C_a s_col[:, j]. Only the rows and the
columns that are best by the first singular vectors of Σ_a C_a are looked at: m of each, so m² of n² slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def direction(cores: Tensor, before: Tensor) -> Tensor:
    """u and v (2 x r), the first singular vectors of Σ_a C_a, with that of the two signs which is nearer to before.

    cores: (heads x r x r). before: u and v of the last step. Both have no gradient. With the other sign the rows and
    columns with the smallest scores would be looked at.
    """
    total = cores.detach().sum(0)
    left, _, right = torch.linalg.svd(total if total.dtype == torch.float64 else total.float())
    found = torch.stack([left[:, 0], right[0]])
    return torch.where((found * before.to(found.dtype)).sum() < 0, -found, found)


def best_slots(row: Tensor, column: Tensor, cores: Tensor, uv: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The numbers i n + j of the best slots (T x top) by the sum of their scores, and the scores (T x heads x top).

    row, column: scores of the n rows and columns (T x r x n). cores: (heads x r x r). uv: see `direction`. top: slots,
    and also rows and columns, that are kept, m.
    """
    rows = torch.einsum("trn,r->tn", row, uv[0]).topk(top, dim=-1).indices  # T x m
    columns = torch.einsum("trn,r->tn", column, uv[1]).topk(top, dim=-1).indices
    count = row.shape[-1]
    row = row.gather(2, rows[:, None].expand(-1, row.shape[1], -1))  # T x r x m
    column = column.gather(2, columns[:, None].expand(-1, column.shape[1], -1))
    grid = torch.einsum("tri,hrs,tsj->thij", row, cores, column).flatten(2)  # T x heads x m²
    best = grid.detach().sum(1).topk(top, dim=-1).indices
    slots = rows.gather(1, best // top) * count + columns.gather(1, best % top)
    return slots, grid.gather(2, best[:, None].expand(-1, len(cores), -1))
