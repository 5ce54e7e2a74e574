"""Signals as sparse combinations of atoms: orthogonal matching pursuit, and atoms to start from.

For what learns dictionaries: CoSpaDi (arXiv:2509.22075) and DSFormer (arXiv:2312.13211).
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-6  # on the Gram matrix of unit-norm atoms; the paper's
_CHUNK = 1 << 21  # numbers that sparse coding holds at a time on a CPU, near its cache
_DEVICE_CHUNK = 1 << 28  # and elsewhere: 1 GB


def drawn_atoms(signals: Tensor, atoms: int, seed: int) -> Tensor:
    """k different rows of the signals (n x d), drawn at random, with unit norm (k x d).

    Signals that are 0 are left out; where there are too few others, random directions follow.
    """
    generator = torch.Generator().manual_seed(seed)
    alive = (signals.norm(dim=1) > 0).nonzero()[:, 0]
    chosen = alive[torch.randperm(len(alive), generator=generator)[:atoms].to(alive.device)]
    more = torch.randn(atoms - len(chosen), signals.shape[1], generator=generator).to(signals)
    return torch.nn.functional.normalize(torch.cat([signals[chosen], more]), dim=1)


def singular_atoms(signals: Tensor, atoms: int, seed: int) -> Tensor:
    """The k leading right singular vectors of the signals (n x d), and `drawn_atoms` where there are fewer (k x d).

    Our choice. A few rounds from here leave less error than dozens from drawn signals, which start far above the SVD.
    """
    vectors = torch.linalg.svd(signals, full_matrices=False).Vh[:atoms]
    return torch.cat([vectors, drawn_atoms(signals, atoms - len(vectors), seed)])


def orthogonal_matching_pursuit(signals: Tensor, dictionary: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Greedy coefficients of signals (n x d) over unit-norm atoms (k x d), exactly s each: values, indices (n x s).

    Both may have further dimensions in front, the same ones: problems that are solved together. The indices ascend.
    Each step takes the atom most correlated with what is left, and then fits all coefficients anew, which here is a
    Cholesky factorization of the chosen atoms' Gram matrix, one row a step. The factor's rows are kept over all k atoms
    (they are the correlations of the atoms with an orthonormal basis of the chosen ones), so that a step updates the
    correlations without touching the signals.
    """
    gram = (dictionary @ dictionary.mT).flatten(0, -2)
    atoms = dictionary.shape[-2]
    correlations = signals @ dictionary.mT
    problem = torch.arange(0, len(gram), atoms, device=signals.device)  # where each Gram matrix begins
    begins = problem.repeat_interleave(signals.shape[-2])[:, None]
    parts = []
    chunk = max(1, (_CHUNK if signals.is_cpu else _DEVICE_CHUNK) // (nonzeros * atoms))
    for part, begin in zip(correlations.flatten(0, -2).split(chunk), begins.split(chunk), strict=True):
        left = part.clone()  # correlations of what is left with every atom (c x k)
        rows = part.new_empty(len(part), nonzeros, atoms)
        picks = torch.empty(len(part), nonzeros, dtype=torch.long, device=part.device)
        projections = part.new_empty(len(part), nonzeros)
        taken = torch.zeros_like(part)  # -inf where an atom may not be chosen again
        for step in range(nonzeros):
            pick = _largest(left.abs().add_(taken))
            taken.scatter_(1, pick, -torch.inf)
            row = gram.index_select(0, (begin + pick)[:, 0])
            if step:
                known = rows[:, :step]
                at_pick = known.gather(2, pick[:, None].expand(-1, step, 1))
                row = torch.baddbmm(row[:, None], at_pick.mT, known, alpha=-1)[:, 0]
            pivot = (row.gather(1, pick) + _RIDGE).clamp_min_(_RIDGE).rsqrt_()
            row *= pivot
            projection = left.gather(1, pick) * pivot
            left -= projection * row
            rows[:, step] = row
            picks[:, step : step + 1], projections[:, step : step + 1] = pick, projection
        factor = rows.gather(2, picks[:, None].expand(-1, nonzeros, -1))
        values = torch.linalg.solve_triangular(factor, projections[..., None], upper=True)[..., 0]
        indices, order = picks.sort(1)
        parts.append((values.gather(1, order), indices))
    values, indices = zip(*parts, strict=True)
    shape = (*correlations.shape[:-1], nonzeros)
    return torch.cat(values).view(shape), torch.cat(indices).view(shape)


def _largest(values: Tensor) -> Tensor:
    """Where each row of values (c x k) is largest (c x 1). On a CPU, torch's own argmax takes eight times as long."""
    if values.is_cpu:
        return torch.from_numpy(values.detach().numpy().argmax(1))[:, None]
    return values.argmax(1, keepdim=True)


def scatter(values: Tensor, indices: Tensor, atoms: int) -> Tensor:
    """The coefficients (... x n x s) as a dense matrix (... x n x k)."""
    return values.new_zeros(*values.shape[:-1], atoms).scatter_(-1, indices, values)
