"""The closed forms of ROME and MEMIT: changes of W (d_out x d_in) under the second moments C of its inputs.

Sources: Meng et al., arXiv:2202.05262, eq. 2; Meng et al., arXiv:2210.07229, eq. 14.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..anatomy import Matrix
from ..data import Specimen
from ..errors import BadData, TransectError
from ..statistics import InputCovariance, collect

_CONDITION = 1e8
_LEAST = 0.05


def second_moments(specimen: Specimen, matrices: list[Matrix]) -> list[Tensor]:
    """C = E[k kᵀ] (d_in x d_in, float64), uncentred, of each matrix's inputs over the specimen's text.

    Where a neuron is always off, or the text is not varied enough, C is made invertible: see `damped`.
    """
    store = collect(specimen.anatomy, specimen.text, [InputCovariance()], matrices, progress=specimen.progress)
    return [damped(store.value(matrix.source, InputCovariance()).double()) for matrix in matrices]


def refuse_short_text(specimen: Specimen, matrix: Matrix) -> None:
    """Raise BadData where the text has fewer tokens than the matrix has inputs: C cannot have full rank."""
    tokens, needed = specimen.text.tokens, matrix.shape[1]
    if tokens < needed:
        raise BadData(
            f"the text has {tokens} tokens, and the second moments of the {needed} inputs of {matrix.name} need at "
            f"least {needed}: pass more text (--data)"
        )


def damped(moments: Tensor) -> Tensor:
    """C, or where its condition number is above 1e8, C + ε I with ε such that it is 1e8 or less (ours)."""
    values = torch.linalg.eigvalsh(moments)
    if values[-1] <= 0:
        raise TransectError("the inputs of the matrix are zero on all of the text: nothing can be written into it")
    shift = (values[-1] / _CONDITION - values[0]).clamp_min(0)
    return moments + shift * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


def rank_one(change: Tensor, moments: Tensor, mean_key: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """ROME: ΔW with ΔW k = change, of least tr(ΔW C ΔWᵀ) where k = k*, as factors (d_out x 1, 1 x d_in).

    change: what the output at k is to gain (d_out). mean_key: k* (d_in), the key averaged over contexts. key: k (d_in),
    that of the bare prompt. u = C⁻¹ k* / ||C⁻¹ k*||, ΔW = change uᵀ / (uᵀ k).
    Raises TransectError where uᵀ k is so much smaller than uᵀ k* that the change would explode.
    """
    direction = torch.linalg.solve(moments, mean_key)
    direction = direction / direction.norm()
    along, expected = float(direction @ key), float(direction @ mean_key)
    if along < _LEAST * expected:
        raise TransectError(
            f"the prompt's key has {along:.2e} along the direction of the edit, and its mean over contexts "
            f"{expected:.2e}: the edit would have to be too large; pass more text, or use fewer "
            "contexts or another layer"
        )
    return change[:, None] / along, direction[None]


def ridge(residuals: Tensor, keys: Tensor, moments: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """MEMIT: ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹ which minimises ||ΔW K - R||² + λ tr(ΔW C ΔWᵀ).

    residuals: R (d_out x N). keys: K (d_in x N). weight: λ > 0. Returns the factors R (λ I + Kᵀ C⁻¹ K)⁻¹
    (d_out x N) and Kᵀ C⁻¹ (N x d_in), whose product is the same and stays exact for a small λ.
    """
    whitened = torch.linalg.solve(moments, keys)
    inner = weight * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ whitened
    return torch.linalg.solve(inner, residuals.T).T, whitened.T
