"""A matrix by codes: what is stored of it, and where it starts, from k-means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....operators.codebook import Mode
from .grouping import group_rows
from .lloyd import lloyd


@dataclass(frozen=True)
class Coding:
    """Ŵ_ij = a_g c_k: row i is of group g, entry ij has code k.

    codes: c (1 x K, or G x K where each group has its own), ascending. scale: a (G x 1), or None for 1.
    labels: every g (d_out). indices: every k (d_out x d_in).
    """

    codes: Tensor
    scale: Tensor | None
    labels: Tensor
    indices: Tensor

    @property
    def table(self) -> Tensor:
        """The K numbers of each group (G x K)."""
        return self.codes if self.scale is None else self.scale * self.codes

    def to_dense(self) -> Tensor:
        """Ŵ (d_out x d_in)."""
        return self.table[self.labels].gather(1, self.indices)


def started(weight: Tensor, bits: int, groups: int, mode: Mode, seed: int) -> Coding:
    """Rows grouped, and k-means of the weights; or of the weights over a_g, their standard deviation in the group.

    The latter weighs each by a_g², so that it too lowers the error of W.
    """
    labels = group_rows(weight, groups, seed)
    if mode == "scale":
        scale = spreads(weight, labels, groups)[:, None]
        codes, indices = lloyd(weight / scale[labels], scale[labels].square(), 2**bits)
        return Coding(codes[None], scale, labels, indices)
    codes = weight.new_zeros(groups, 2**bits)
    indices = torch.zeros(weight.shape, dtype=torch.long, device=weight.device)
    for group in labels.unique().tolist():
        codes[group], indices[labels == group] = lloyd(weight[labels == group], None, 2**bits)
    return Coding(codes, None, labels, indices)


def spreads(weight: Tensor, labels: Tensor, groups: int) -> Tensor:
    """Standard deviation of the weights of each group of rows (groups); 1 where it is 0."""
    rows = torch.bincount(labels, minlength=groups).clamp_min(1)

    def mean(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(groups).index_add_(0, labels, numbers.mean(1)) / rows

    found = mean((weight - mean(weight)[labels][:, None]).square()).sqrt()
    return torch.where(found > 0, found, 1)
