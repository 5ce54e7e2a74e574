"""What a model loses when a point's activations are replaced by what a dictionary, or something else, makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..data import Batches
from ..evaluation import evaluate_loss
from ..forward import Point, changed
from .activations import counted
from .dictionary import Dictionary

Replacement = Callable[[Tensor], Tensor]


@torch.no_grad()
def spliced_losses(
    anatomy: Anatomy, data: Batches, point: Point, layer: int, replacements: Mapping[str, Replacement], first: bool
) -> dict[str, float]:
    """Loss in nats, by name, with every taken position's activations x (n x D) replaced by what the function gives.

    first: whether a sequence's first token is replaced as well; else it stays as it is.
    """
    nats, tokens = dict.fromkeys(replacements, 0.0), 0
    for batch in data:
        taken = counted(batch, first).to(anatomy.model.device)
        for name, replacement in replacements.items():

            def change(x: Tensor, replacement: Replacement = replacement, taken: Tensor = taken) -> Tensor:
                rows = x.reshape(-1, x.shape[-1]).clone()
                where = taken.flatten()
                rows[where] = replacement(rows[where]).to(x.dtype)
                return rows.view_as(x)

            with changed(anatomy, {(point, layer): change}):
                found = evaluate_loss(anatomy.model, [batch])
            nats[name] += found.loss * found.tokens
        tokens += found.tokens
    return {name: total / tokens for name, total in nats.items()}


def recovered(clean: float, replaced: float, zero: float) -> float:
    """(CE_zero - CE_replaced) / (CE_zero - CE_clean): 1 for the identity, 0 for zeros; it may be below 0, or above 1.

    NaN where zeros cost nothing, so that there is nothing to recover.
    """
    return (zero - replaced) / (zero - clean) if zero != clean else float("nan")


def pinned(dictionary: Dictionary, features: Sequence[int], values: Sequence[float]) -> Replacement:
    """Vectors in which these features have these activations: x + W_dec (a' - a), so that what the dictionary does not
    explain of x stays as it is. Activations of 0 take features out."""
    index, given = torch.as_tensor(features, dtype=torch.long), torch.as_tensor(values)

    def pin(x: Tensor) -> Tensor:
        wide = x.to(dictionary.decoder.dtype)
        at = index.to(wide.device)
        rows = dictionary.encoder[at]
        a = nn.functional.linear(wide - dictionary.decoder_bias, rows, dictionary.encoder_bias[at]).relu()
        return wide + (given.to(a) - a) @ dictionary.decoder[:, at].T

    return pin


class Principal:
    """The principal directions of vectors, to compare a dictionary with: sums of x and x xᵀ, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Vectors (n x D)."""
        x = x.double().cpu()
        self.count += len(x)
        self.sum += x.sum(0)
        self.products += x.T @ x

    def replacement(self, directions: int) -> Replacement:
        """Every vector's projection on the mean and so many directions around it."""
        mean = self.sum / self.count
        vectors = torch.linalg.eigh(self.products / self.count - mean.outer(mean)).eigenvectors.flip(1)[:, :directions]

        def project(x: Tensor) -> Tensor:
            wide = x if x.dtype == torch.float64 else x.float()
            m, v = mean.to(wide), vectors.to(wide)
            return m + (wide - m) @ v @ v.T

        return project
