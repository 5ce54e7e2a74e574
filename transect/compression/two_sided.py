"""Rounding a matrix to grids so that the loss grows least under a metric on both sides."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cholesky import raised_cholesky
from .integers import Grid

_TILE = 32  # rows and columns that are rounded in steps of their own; changes the speed, not the result


def round_two_sided(weight: Tensor, gradients: Tensor, inputs: Tensor, grid: Grid, group: int) -> Tensor:
    """The integers (uint8, d_out x d_in) of Ŵ, chosen one by one so that tr(Γ Δ A Δᵀ) is small, Δ = W - Ŵ.

    weight: W (d_out x d_in). gradients: Γ (d_out x d_out), inputs: A (d_in x d_in), positive definite.
    grid: of W's groups of `group` columns, scales d_out x groups.

    With Γ = Mᵀ D M and A = Nᵀ E N, M and N unit lower triangular, the price is Σ D_i E_j R_ij² for R = M Δ Nᵀ, and
    R_ij is Δ_ij plus what the roundings to the left and above contribute. So each entry is rounded with that added to
    it, and R_ij is what the rounding leaves, at most half a step. GPTQ is the case Γ = I; rounding by both sides is
    that of YAQA (Tseng, Sun and De Sa, 2025, arXiv:2505.22988). Entries on one anti-diagonal do not wait for each
    other: tiles are taken by anti-diagonals, all of one at once, and the entries in them likewise.
    """
    (d_out, d_in), b = weight.shape, _TILE
    above, left = (_unit_lower(metric).float() for metric in (gradients, inputs))
    above, left = (pad(m, (0, -len(m) % b, 0, -len(m) % b)) for m in (above, left))  # M, N
    work = pad(weight.float(), (0, -d_in % b, 0, -d_out % b))
    columns = torch.arange(d_in, device=weight.device) // group
    scale, zero = (pad(points.float()[:, columns], (0, -d_in % b, 0, -d_out % b)) for points in (grid.scale, grid.zero))
    rows_of_tiles, columns_of_tiles = (size // b for size in work.shape)
    error, gathered = torch.zeros_like(work), torch.zeros_like(work)  # Δ, and V = Δ Nᵀ
    codes = torch.zeros_like(work)
    for diagonal in range(rows_of_tiles + columns_of_tiles - 1):
        first = max(0, diagonal - columns_of_tiles + 1)
        tiles = [(i, diagonal - i) for i in range(first, min(rows_of_tiles - 1, diagonal) + 1)]
        places = [(slice(i * b, i * b + b), slice(j * b, j * b + b)) for i, j in tiles]
        wanted, from_left, from_above = [], [], []
        for rows, cols in places:
            wanted.append(work[rows, cols])
            from_left.append(error[rows, : cols.start] @ left[cols, : cols.start].T)
            from_above.append(above[rows, : rows.start] @ gathered[: rows.start, cols])
        made = _round_tiles(
            torch.stack(wanted), torch.stack(from_left), torch.stack(from_above),
            torch.stack([above[rows, rows] for rows, _ in places]),
            torch.stack([left[cols, cols] for _, cols in places]),
            torch.stack([scale[place] for place in places]), torch.stack([zero[place] for place in places]),
            2**grid.bits - 1,
        )  # fmt: skip
        for place, number, delta, of_row in zip(places, *made, strict=True):
            codes[place], error[place], gathered[place] = number, delta, of_row
    return codes[:d_out, :d_in].to(torch.uint8)


def _round_tiles(
    wanted: Tensor, from_left: Tensor, from_above: Tensor, above: Tensor, left: Tensor, scale: Tensor, zero: Tensor,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The integers of some tiles (tiles x b x b), their Δ and V, by anti-diagonals.

    from_left, from_above: what earlier tiles contribute to R. above, left: the diagonal blocks of M and N.
    """
    b = wanted.shape[-1]
    # Columns in reverse make diagonals of the anti-diagonals, and the tiles lie side by side: (row, column, tile).
    wanted, from_left, from_above, scale, zero = (
        each.permute(1, 2, 0).flip(1).contiguous() for each in (wanted, from_left, from_above, scale, zero)
    )
    from_above = from_above.transpose(0, 1).contiguous()  # (column, row, tile)
    codes, error = torch.empty_like(wanted), torch.empty_like(wanted)
    inverse = 1 / scale.clamp_min(1e-30)
    # What Δ_ij adds to the entries to its right, and V_ij to those below.
    right = left.tril(-1).permute(2, 1, 0).flip(0, 1).contiguous()  # (column, column to the right, tile)
    below = above.tril(-1).permute(2, 1, 0).contiguous()  # (row, row below, tile)
    for step in range(2 * b - 1):
        shift = b - 1 - step
        rows, columns = (slice(max(0, -by), min(b, b - by)) for by in (shift, -shift))
        seen, points, at = (each.diagonal(shift).T for each in (from_left, zero, wanted))  # (entries, tiles)
        target = at + seen
        target += from_above.diagonal(-shift).T
        number = torch.addcmul(points, target, inverse.diagonal(shift).T).round_().clamp_(0, most)
        delta = torch.addcmul(at, number - points, scale.diagonal(shift).T, value=-1)
        codes.diagonal(shift).copy_(number.T)
        error.diagonal(shift).copy_(delta.T)
        from_above[columns].addcmul_((delta + seen)[:, None], below[rows])
        from_left[rows].addcmul_(delta[:, None], right[columns])
    found = (codes, error, error + from_left)
    return tuple(each.flip(1).permute(2, 0, 1) for each in found)  # type: ignore[return-value]


def pivots(metric: Tensor) -> Tensor:
    """D (n), positive, with metric = Mᵀ diag(D) M for a unit lower triangular M: a rounding's errors cost D."""
    return _upper(metric).diagonal().square()


def _unit_lower(metric: Tensor) -> Tensor:
    """M, unit lower triangular, with metric = Mᵀ D M for a diagonal D."""
    upper = _upper(metric)
    return (upper / upper.diagonal()).T.contiguous()


def _upper(metric: Tensor) -> Tensor:
    """U (n x n), upper triangular, float64, with U Uᵀ = metric, which is raised where it is singular, or 0."""
    return raised_cholesky(metric.double().flip(0, 1))[0].flip(0, 1)
