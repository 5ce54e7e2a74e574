"""The projection of DSFormer: every column block of a matrix as row-sparse coefficients times dense bases.

W (m x n) is cut into B blocks of c columns. Block W_β ≈ S_β D_β, with D_β (k x c) dense and S_β (m x k) of s non-zeros
in every row. All blocks are solved together, as tensors with B in front. Our design, but for the form of the factors:
the paper's own update was not available to us.
"""

from __future__ import annotations

from math import floor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import OutOfReach
from ..operators.dense_sparse import dense_sparse_bytes
from ..operators.dictionary import fit_on_support
from .sparse_coding import drawn_atoms, orthogonal_matching_pursuit, scatter, singular_atoms

Start = Literal["svd", "rows"]

_RIDGE = 1e-6  # on SᵀS, for signals whose entries have mean square 1


class Projection(NamedTuple):
    """bases: D (B x k x c). values: of S (B x m x s). indices: their bases (B x m x s), ascending."""

    bases: Tensor
    values: Tensor
    indices: Tensor

    def blocks(self) -> Tensor:
        """S_β D_β of every block (B x m x c)."""
        return scatter(self.values, self.indices, self.bases.shape[1]) @ self.bases


def fitting(shape: tuple[int, int], itemsize: int, keep: float, width: int, ratio: float) -> tuple[int, dict[str, int]]:
    """The most non-zeros s a row and block, with k = floor(ratio s) bases, that `keep` pays for.

    Blocks are as even as possible, and none is wider than `width`. Returns the bytes and the sizes: blocks, bases,
    nonzeros. Raises OutOfReach where there are none.
    """
    (d_out, d_in), found = shape, None
    blocks, budget = -(-d_in // width), keep * d_out * d_in * itemsize
    for nonzeros in range(1, d_in + 1):  # fewer than a block is wide, as they cost as much as that many columns
        bases = floor(ratio * nonzeros)
        size = dense_sparse_bytes(d_out, d_in, blocks, bases, nonzeros, itemsize)
        if size > budget or bases > d_out:
            break
        found = size, {"blocks": blocks, "bases": bases, "nonzeros": nonzeros}
    if found is None:
        least = dense_sparse_bytes(d_out, d_in, blocks, floor(ratio), 1, itemsize) / (d_out * d_in * itemsize)
        raise OutOfReach(
            f"a {d_out} x {d_in} matrix at keep={keep:g} leaves no non-zero in {blocks} blocks of at most {width} "
            f"columns: one a row, of {floor(ratio)} bases, takes {least:.3f}; raise keep or width, or lower ratio"
        )
    return found


def column_blocks(weight: Tensor, count: int) -> Tensor:
    """W (m x n) as B = count blocks of equal width (B x m x c), with zeros at the end where B does not divide n."""
    width = -(-weight.shape[1] // count)
    padded = torch.nn.functional.pad(weight, (0, count * width - weight.shape[1]))
    return padded.unflatten(1, (count, width)).transpose(0, 1)


def starting_bases(blocks: Tensor, bases: int, start: Start, seed: int) -> Tensor:
    """Unit-norm bases (B x k x c) to start from: rows of each block (`drawn_atoms`), or its `singular_atoms`."""
    begin = drawn_atoms if start == "rows" else singular_atoms
    return torch.stack([begin(block, bases, seed) for block in blocks])


def project(blocks: Tensor, begun: Tensor, nonzeros: int, iterations: int) -> Projection:
    """Minimise ||W_β - S_β D_β||² in every block by OMP and least squares in turn; each block's best round.

    blocks: W_β (B x m x c). begun: unit-norm bases (B x k x c), those of an earlier projection for a warm start.
    nonzeros: s, from 1 to k. OMP is greedy, so a round may raise the error; the half-step of least squares never does.
    In the end the values are fitted anew on their support. The rounds are in float32 but for their least squares, the
    factors in float64.
    """
    scale = blocks.double().square().mean().sqrt().clamp_min(1e-150)
    signals, bases = (blocks / scale).float(), begun.float()
    kept, least = None, torch.full((len(blocks),), torch.inf, device=blocks.device)
    for _ in range(iterations):
        values, indices = orthogonal_matching_pursuit(signals, bases, nonzeros)
        bases, values = fitted_bases(signals, bases, values, indices)
        made = Projection(bases, values, indices)
        errors = (signals - made.blocks()).square().sum((1, 2))
        better = errors < least
        kept = made if kept is None else Projection(*(
            torch.where(better[:, None, None], new, old) for new, old in zip(made, kept, strict=True)
        ))  # fmt: skip
        least = torch.where(better, errors, least)
        bases = without_idle(signals, made)
    assert kept is not None
    return _with_fitted_values(blocks, kept, scale)


def refined(blocks: Tensor, made: Projection) -> Projection:
    """The same support fitted to blocks (B x m x c) that have changed: the bases for the values, then these for those.

    Neither step raises the error. In float64.
    """
    scale = blocks.double().square().mean().sqrt().clamp_min(1e-150)
    bases, values = fitted_bases(
        blocks.double() / scale, made.bases.double(), made.values.double() / scale, made.indices
    )
    return _with_fitted_values(blocks, Projection(bases, values, made.indices), scale)


def _with_fitted_values(blocks: Tensor, made: Projection, scale: Tensor) -> Projection:
    """The best values for the bases on their support, in float64. scale: of the blocks over those that were fitted."""
    dictionary, wanted = made.bases.double(), blocks.double()
    fitted = [
        fit_on_support(d @ d.T, w @ d.T, indices, scale * values.double())
        for d, w, values, indices in zip(dictionary, wanted, made.values, made.indices, strict=True)
    ]
    return Projection(dictionary, torch.stack(fitted), made.indices)


def fitted_bases(blocks: Tensor, bases: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares half-step: D <- D + (SᵀS + 1e-6 I)⁻¹ Sᵀ(W - S D). Returns D and the values of S.

    Solving for what is left keeps the error from rising whatever the ridge, and leaves bases alone that no row uses.
    D's rows come back with unit norm and S with what they had. In float64.
    """
    count, signals = bases.shape[1], blocks.double()
    coefficients, dictionary = scatter(values.double(), indices, count), bases.double()
    gram = coefficients.mT @ coefficients
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    left = coefficients.mT @ (signals - coefficients @ dictionary)
    dictionary = dictionary + torch.cholesky_solve(left, torch.linalg.cholesky(gram))
    norms = dictionary.norm(dim=2)
    norms = torch.where(norms > 0, norms, 1)
    coefficients = coefficients * norms[:, None]
    return (dictionary / norms[..., None]).to(bases), coefficients.gather(2, indices).to(values)


def without_idle(blocks: Tensor, made: Projection) -> Tensor:
    """The bases, those that no row of their block uses replaced by the directions of the rows that are fitted worst."""
    count = made.bases.shape[1]
    idle = scatter(torch.ones_like(made.values), made.indices, count).sum(1) == 0  # B x k
    if not idle.any():
        return made.bases
    worst = (blocks - made.blocks()).norm(dim=2).argsort(1, descending=True)  # B x m
    turn = (idle.long().cumsum(1) - 1).clamp(0, blocks.shape[1] - 1)
    rows = worst.gather(1, turn)[..., None].expand(-1, -1, blocks.shape[2])
    directions = torch.nn.functional.normalize(blocks.gather(1, rows), dim=2)
    return torch.where(idle[..., None], directions, made.bases)
