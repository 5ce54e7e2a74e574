"""Slices of one weight, all mixed into one weight of the same size: the algebra of entangled sizes.

An axis has C choices of a size, rising, with weights β (C) that sum to 1. Choice c of a dimension keeps its first c
indices (of a kernel the middle ones) and is zero elsewhere: W^(c) = mask_c ⊙ W. The mixture

    W_mix = Σ_c β_c mask_c ⊙ W

multiplies index i by the sum of β over the choices that contain it. As the choices lie within each other, that is a sum
over all from one choice on, its *level*: nothing of W is ever copied C times. Several axes multiply, since their
choices are all combinations and the weights of these the products: Σ_cd β_c γ_d m_c n_dᵀ = (Σ β_c m_c)(Σ γ_d n_d)ᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UNTOUCHED = -1  # the level of an index that the axis does not reach: its factor is 1


def levels_of(size: int, choices: Sequence[int], *, centred: bool = False) -> Tensor:
    """For each of `size` indices (int64) the first of the rising choices that contains it; C where none does.

    centred: a choice keeps the middle instead of the beginning; of an odd remainder the smaller half is in front.
    """
    index = torch.arange(size)
    if not centred:
        return torch.bucketize(index, torch.tensor(list(choices)), right=True)
    starts = [(size - choice) // 2 for choice in choices]
    outside = [(index < start) | (index >= start + choice) for start, choice in zip(starts, choices, strict=True)]
    return torch.stack(outside).sum(0)


def factors(beta: Tensor, levels: Tensor) -> Tensor:
    """What the mixture multiplies each index by, in the levels' shape: Σ of β over the choices that contain it."""
    table = torch.cat([beta.flip(0).cumsum(0).flip(0), beta.new_zeros(1), beta.new_ones(1)])
    return table[levels.to(beta.device)]


def mixed(weight: Tensor, axes: Sequence[tuple[Tensor, Mapping[int, Tensor]]]) -> Tensor:
    """W_mix, in the shape of W, with its gradient to W and to every β.

    axes: of each axis its β (C) and the levels along each dimension of W that it governs. Where it governs several
    (both sides of a kernel), a choice keeps an entry that it keeps along all of them: the largest level decides.
    """
    for beta, governed in axes:
        together: Tensor | None = None
        for dim, levels in governed.items():
            shape = [1] * weight.dim()
            shape[dim] = -1
            spread = levels.view(shape)
            together = spread if together is None else torch.maximum(together, spread)
        if together is not None:
            weight = weight * factors(beta, together).to(weight.dtype)
    return weight
