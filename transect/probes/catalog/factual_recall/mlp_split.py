"""An MLP's output as a combination of the heads' outputs that it read, and a part that comes from none of them.

Our design: Lv et al., arXiv:2403.19521, describe such a split, and their exact regression is not known to us.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import BadData

TRUSTED = 0.5  # explained share of the variance below which the coefficients are given no names


@dataclass(frozen=True)
class Split:
    """m_n = Σ_h w_h a_nh + w_r r_n + c + e_n, for N prompts.

    weights: w (H). stream: w_r. component: c (d). left: e (N x d). explained: R² of all prompts, against their mean.
    explained_each: R² of each (N). condition: condition number of the system that was solved, before the ridge.
    """

    weights: Tensor
    stream: Tensor
    component: Tensor
    left: Tensor
    explained: float
    explained_each: Tensor
    condition: float

    @property
    def in_stream(self) -> Tensor:
        """1 + w (H): how much of each head's output is left in the stream behind the MLP."""
        return 1 + self.weights

    def names(self) -> list[str]:
        """ "erased" (below 0.5), "amplified" (above 1) or "" for each head; "" for all where R² is below 0.5."""
        if self.explained < TRUSTED:
            return [""] * len(self.weights)
        return ["erased" if left < 0.5 else "amplified" if left > 1 else "" for left in self.in_stream.tolist()]


def split(mlp: Tensor, heads: Tensor, stream: Tensor, ridge: float = 1e-3) -> Split:
    """Least squares with one weight a head, the same for all prompts and coordinates, and an intercept vector.

    mlp: the outputs m (N x d). heads: outputs a of the heads (N x H x d). stream: the residual r that they were added
    to (N x d). ridge: added to the diagonal, as a share of its mean: heads are collinear on narrow prompts.
    Raises BadData for fewer than two prompts, or prompts that all give the same.
    """
    if len(mlp) < 2:
        raise BadData(f"the split compares prompts, and there is {len(mlp)}; give two or more")
    inputs = torch.cat([heads, stream[:, None]], 1)
    centred, target = inputs - inputs.mean(0), mlp - mlp.mean(0)
    total = target.square().sum()
    if total <= 1e-20 * mlp.square().sum():
        raise BadData("the MLP's output is the same for all prompts: there is nothing to split")
    gram = torch.einsum("nkd,njd->kj", centred, centred)
    system = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weights = torch.linalg.pinv(system, hermitian=True) @ torch.einsum("nkd,nd->k", centred, target)
    component = mlp.mean(0) - weights @ inputs.mean(0)
    left = target - torch.einsum("k,nkd->nd", weights, centred)
    each = 1 - left.square().sum(1) / target.square().sum(1)
    return Split(
        weights[:-1], weights[-1], component, left, float(1 - left.square().sum() / total), each,
        float(torch.linalg.cond(gram)),
    )  # fmt: skip
