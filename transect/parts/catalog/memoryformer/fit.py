"""Tables in the place of a trained matrix: the rows that reproduce its outputs best on calibration inputs (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import TransectError
from .part import MemoryMatrix

DIRECT = 4096  # rows of all tables up to which they are solved for at once


@torch.no_grad()
def fit_tables(part: MemoryMatrix, x: Tensor, y: Tensor, *, ridge: float = 1e-3, steps: int = 50) -> float:
    """Fill the tables, in place, so that ||y - part(x)||² is least; what is left of it, relative to ||y||².

    x: inputs (n x inputs). y: what the matrix makes of them (n x outputs). ridge: what is added to the diagonal, as a
    share of what it is on average if every row is read as often. A bias becomes the mean of y. Few rows are solved for
    directly, many by conjugate gradients, of all outputs at once; rows that no input reads become 0. More bits follow a
    matrix less closely.
    """
    if x.shape[:-1] != y.shape[:-1] or x.dim() != 2 or not len(x):
        raise TransectError(f"inputs {tuple(x.shape)} and outputs {tuple(y.shape)} should be of the same positions")
    layer = part.inner
    wide = torch.promote_types(layer.tables.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    rows, weights = layer.addressed(part.hashed(x))
    shift = y.mean(0) if layer.bias is not None else torch.zeros_like(y[0])
    strength = ridge * float(weights.square().mean()) * max(1.0, len(x) / 2**layer.bits)
    at = torch.arange(len(x), device=x.device)[:, None].expand_as(rows)
    where = torch.stack([at.flatten(), rows.flatten()])
    reading = torch.sparse_coo_tensor(
        where, weights.flatten(), (len(x), len(layer.tables)), check_invariants=False
    ).coalesce()
    if len(layer.tables) <= DIRECT:
        tables = _solved(reading.to_dense(), y - shift, strength)
    else:
        tables = _by_gradients(reading, y - shift, strength, steps)
    layer.tables.copy_(tables)
    if layer.bias is not None:
        layer.bias.copy_(shift)
    return float((y - shift - reading @ tables).square().sum() / y.square().sum())


def _solved(reading: Tensor, y: Tensor, strength: float) -> Tensor:
    """The rows (rows x outputs) with reading @ rows nearest to y, from the normal equations. reading: (n x rows)."""
    gram = (reading.mT @ reading).double()
    gram.diagonal().add_(strength)
    return torch.cholesky_solve((reading.mT @ y).double(), torch.linalg.cholesky(gram)).to(y)


def _by_gradients(reading: Tensor, y: Tensor, strength: float, steps: int) -> Tensor:
    """The same by conjugate gradients, with the reading sparse."""
    spreading = reading.t().coalesce()
    tables = torch.zeros(reading.shape[1], y.shape[1], dtype=y.dtype, device=y.device)
    left = spreading @ y  # the negative gradient
    direction, size = left, left.square().sum(0)
    enough = 1e-12 * size
    for _ in range(steps):
        turned = spreading @ (reading @ direction) + strength * direction
        length = size / (direction * turned).sum(0).clamp_min(torch.finfo(y.dtype).tiny)
        tables += length * direction
        left = left - length * turned
        before, size = size, left.square().sum(0)
        if bool((size <= enough).all()):
            break
        direction = left + size / before.clamp_min(torch.finfo(y.dtype).tiny) * direction
    return tables
