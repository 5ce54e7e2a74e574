"""Sparse dictionary learning: a matrix as sparse combinations of a few learned atoms (OMP and K-SVD).

W ≈ S D with D (k x d_in), whose rows are the atoms, and S (d_out x k), s non-zeros a row: every output unit is a
combination of s atoms that live in input space. The algorithm is CoSpaDi's (arXiv:2509.22075, sections 3-4 and its
appendix on implementation), on the transposed matrices; the rows of `signals` below are the paper's columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import OutOfReach
from ..layers.sparse_coding import drawn_atoms, orthogonal_matching_pursuit, scatter, singular_atoms
from ..operators.dictionary import fit_on_support, sparse_dictionary_bytes
from .cholesky import raised_cholesky
from .registry import Size
from .weighted_svd import shrink

Start = Literal["svd", "columns"]

_POWER_ITERATIONS = 8  # for the rank-1 fit of an atom; the paper's
_PATIENCE = 5  # rounds over which progress is judged: single ones are uneven


class SparseFactors(NamedTuple):
    """W ≈ S D. dictionary: D (k x d_in). values: of S (d_out x s). indices: their atoms (d_out x s), ascending."""

    dictionary: Tensor
    values: Tensor
    indices: Tensor

    def to_dense(self) -> Tensor:
        """S D (d_out x d_in)."""
        return scatter(self.values, self.indices, len(self.dictionary)) @ self.dictionary


def learn(
    weight: Tensor,
    input_covariance: Tensor | None,
    atoms: int,
    nonzeros: int,
    *,
    start: Start = "svd",
    iterations: int = 60,
    tolerance: float = 0.1,
    shrinkage: float = 1e-6,
    seed: int = 42,
) -> SparseFactors:
    """Minimise E||(W - S D) x||² over dictionaries of k atoms and coefficients of s non-zeros a row.

    weight: W (d_out x d_in). input_covariance: C = E[x xᵀ] (d_in x d_in), or None for the identity (data-free).
    atoms: k. nonzeros: s <= k. start: `columns`, the paper's (see `drawn_atoms`), or `svd` (see `singular_atoms`).
    iterations, tolerance: see `alternate`. shrinkage: C becomes (1 - a) C + a mean(diag C) I. seed: of `drawn_atoms`.

    With C = R Rᵀ the objective is ||W R - S (D R)||², so the atoms are learned for W R, in float32, with unit norm, and
    D = (D R) R⁻¹. Then the coefficients are fitted on their support, in float64 (ours; the paper ends with the last
    sweep of K-SVD); the factors are in float64.
    """
    weight = weight.double()
    root = None if input_covariance is None else covariance_root(input_covariance.to(weight), shrinkage)
    signals = weight if root is None else weight @ root
    basis = None
    if len(signals) < signals.shape[1]:  # the atoms lie in the span of the signals: work in coordinates of it
        basis, triangle = torch.linalg.qr(signals.T)
        signals = triangle.T
    scale = signals.square().mean().sqrt().clamp_min(1e-150)
    working = (signals / scale).float()
    begun = drawn_atoms(working, atoms, seed) if start == "columns" else singular_atoms(working, atoms, seed)
    code = alternate(working, begun, nonzeros, iterations, tolerance)
    dictionary = code.dictionary.double()
    values = fit_on_support(
        dictionary @ dictionary.T, signals @ dictionary.T, code.indices, code.values.double() * scale
    )
    if basis is not None:
        dictionary = dictionary @ basis.T
    if root is not None:
        dictionary = torch.linalg.solve_triangular(root, dictionary, upper=False, left=False)
    return SparseFactors(dictionary, values, code.indices)


def dictionary_size(shape: tuple[int, int], itemsize: int, keep: float, ratio: float) -> Size:
    """The largest dictionary of k = floor(ratio s) atoms that a matrix's share pays for, in stored bytes.

    shape: (d_out, d_in). ratio: the paper's ρ, at least 1. Raises OutOfReach where one atom is too much.
    """
    d_out, d_in = shape
    budget = keep * d_out * d_in * itemsize

    def cost(nonzeros: int) -> int:
        return sparse_dictionary_bytes(d_out, d_in, floor(ratio * nonzeros), nonzeros, itemsize)

    low, high = 0, max(d_out, d_in)  # a size that fits (none at all does), and one that does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if low < 1:
        raise OutOfReach(
            f"a {d_out} x {d_in} matrix at keep={keep:g} leaves no atom: the smallest dictionary takes {cost(1)} bytes "
            f"of the {budget:.0f} that the share is; raise keep to {cost(1) / (d_out * d_in * itemsize):.3f} or more"
        )
    return Size(cost(low), {"atoms": floor(ratio * low), "nonzeros": low})


def nominal_kept(shape: tuple[int, int], atoms: int, nonzeros: int) -> float:
    """Share of the dense storage by the paper's count, k d_in + s d_out values, in which the support costs nothing.

    The paper pays for the support with bits of the coefficients: ρ fewer for each of 16.
    """
    d_out, d_in = shape
    return (atoms * d_in + nonzeros * d_out) / (d_out * d_in)


def covariance_root(covariance: Tensor, shrinkage: float) -> Tensor:
    """R (lower triangular) with R Rᵀ = the shrunk covariance, raised by the least that makes it definite.

    How the paper stabilises its root is not known to us; this is our choice. Inputs that are always 0 give R = I.
    """
    if not covariance.any():
        return torch.eye(len(covariance)).to(covariance)
    root, _ = raised_cholesky(shrink(covariance, shrinkage))
    return root


@dataclass
class Code:
    """dictionary: unit-norm atoms (k x d). values, indices: coefficients (n x s), their atoms. error: ||X - S D||²."""

    dictionary: Tensor
    values: Tensor
    indices: Tensor
    error: float


def alternate(signals: Tensor, dictionary: Tensor, nonzeros: int, iterations: int, tolerance: float) -> Code:
    """Sparse coding and dictionary updates in turn, from the given unit-norm atoms (k x d); the best iterate.

    A K-SVD sweep never raises ||X - S D||; coding anew may, since OMP is greedy. It stops after `iterations` rounds, or
    once the last five together have lowered the least squared error by less than the share `tolerance` (our choice).
    """
    dictionary = dictionary.clone()
    best: Code | None = None
    least: list[float] = []
    for _ in range(iterations):
        values, indices = orthogonal_matching_pursuit(signals, dictionary, nonzeros)
        values = update_atoms(signals, dictionary, values, indices)
        error = float((signals - scatter(values, indices, len(dictionary)) @ dictionary).square().sum())
        if best is None or error < best.error:
            best = Code(dictionary.clone(), values, indices, error)
        least.append(best.error)
        if len(least) > _PATIENCE and least[-1] > (1 - tolerance) * least[-1 - _PATIENCE]:
            break
    assert best is not None
    return best


def update_atoms(signals: Tensor, dictionary: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """A K-SVD sweep: every atom and its coefficients fitted to what the other atoms leave. Returns the new values.

    signals: n x d. dictionary: k x d, changed in place. values, indices: n x s.
    For each atom in turn, power iterations from the present coefficients find the best rank-1 fit to the residual of
    the signals that use it, its own part put back. An atom that no signal uses becomes the worst-fitted signal.
    """
    coefficients = scatter(values, indices, len(dictionary))
    residual = signals - coefficients @ dictionary
    used = scatter(torch.ones_like(values), indices, len(dictionary)).bool()
    owners, users = used.T.nonzero().unbind(1)
    by_atom = users.split(torch.bincount(owners, minlength=len(dictionary)).tolist())
    unused = []
    for atom, mine in enumerate(by_atom):
        if len(mine) == 0:
            unused.append(atom)
            continue
        column, direction = coefficients[mine, atom], dictionary[atom]
        target = residual[mine].addr_(column, direction)
        norm = column.new_zeros(())
        for _ in range(_POWER_ITERATIONS):
            direction = torch.mv(target.T, column)
            norm = direction.norm()
            direction /= norm.clamp_min(torch.finfo(norm.dtype).tiny)
            column = torch.mv(target, direction)
        if norm > 0:  # else nothing is left to fit
            dictionary[atom] = direction
            coefficients[mine, atom] = column
            residual[mine] = target.addr_(column, direction, alpha=-1)
    if unused:
        worst = residual.norm(dim=1).topk(min(len(unused), len(signals))).indices
        seeds = torch.nn.functional.normalize(signals[worst], dim=1)
        dictionary[torch.tensor(unused[: len(seeds)], device=worst.device)] = seeds
    return coefficients.gather(1, indices)
